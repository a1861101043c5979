"""Distributions of sums of rounded Gaussians, on the integers from -reach to reach."""

import numpy as np
from scipy.interpolate import BSpline
from scipy.stats import norm


def rounded(variance: float, reach: int) -> np.ndarray:
    """Return the chances of round(N(0, variance))."""
    edges = np.arange(-reach, reach + 2) - 0.5
    return np.diff(norm.cdf(edges / np.sqrt(variance)))


def sum_of_rounded(variances, reach: int) -> np.ndarray:
    """Return the chances of a sum of independent rounded Gaussians, by convolution."""
    transform = np.ones(2 * reach + 1, complex)
    for variance in variances:
        transform = transform * np.fft.fft(np.fft.ifftshift(rounded(variance, reach)))
    return np.fft.fftshift(np.fft.ifft(transform)).real


def randomly_rounded(variance: float, summands: int, reach: int) -> np.ndarray:
    """Return the chances of N(0, variance) rounded at random with the weights B_m(k - y).

    The integral of B_m(k - y)·g(y) over y, by the trapezoidal rule; B_m is the density of a sum of
    ``summands`` uniform numbers, from its recursion.
    """
    knots = np.arange(summands + 1) - summands / 2
    weight = BSpline.basis_element(knots, extrapolate=False)
    y = np.linspace(-reach - summands, reach + summands, 200 * (reach + summands) + 1)
    density = norm.pdf(y / np.sqrt(variance)) / np.sqrt(variance) * (y[1] - y[0])
    return np.array([np.nan_to_num(weight(k - y)) @ density for k in np.arange(-reach, reach + 1)])


def total_variation(first: np.ndarray, second: np.ndarray) -> float:
    return 0.5 * float(np.abs(first - second).sum())
