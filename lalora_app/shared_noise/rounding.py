"""The privacy cost of a sum of many rounded Gaussians in place of a single Gaussian.

Let y = Σx + N(0, σ²) with an integer vector Σx: the Gaussian mechanism. Round y at random to an
integer k with probability B_m(k - y), where B_m is the density of a sum of m uniform numbers on
(-1/2, 1/2); these probabilities add up to 1 over k. That is post-processing, at no cost. Its
chance of k is (g_σ * B_m)(k - Σx), with g_σ the density of the noise.

The sum of m rounded Gaussians round(N(0, v_j)), Σ v_j = σ², has nearly this distribution. One of
them has the chance (g_v * B_1)(k) of k. Two have Σ_i f₁(i)·f₂(k - i), which by Poisson's formula is
Σ_l ∫ f₁(x) f₂(k - x) e^{-2πilx} dx: the term of l = 0 is the value wanted, and each other one is at
most e^{-2π²l²τ²} of it, τ² = v₁v₂/(v₁+v₂). Added from the largest variance down, τ² is at least
half of the smaller variance. So every probability is that of the randomly rounded mechanism times
a factor within (1 ± θ(v))^{m-1}, with v the smallest variance and θ(v) = 2 Σ_{l≥1} e^{-π²l²v}.

A comparison with *one* rounded Gaussian of variance σ² gives a far larger distance,
φ(1)/12·(m - 1)/σ² = 0.0202·(m - 1)/σ² per entry. All of it is that each rounding adds 1/12 to the
variance: more noise than promised, not less.
"""

import math

_TERMS = 32  # of θ; the next is below 1e-300 for every variance from 0.07 upwards
_SMALLEST = 0.07  # below it the bound is above 1 or of no use


def distance(summands: int, variance: float) -> float:
    """Return a bound of the total variation distance of one entry from the Gaussian mechanism.

    ½·((1 + θ(v))^{m-1} - 1), and at most 1.

    Args:
        summands: m, number of rounded Gaussians in the sum.
        variance: v, the smallest variance of one of them, in lattice units squared.

    Limits: one summand gives 0; v → ∞ gives 0: below 1e-17·(m - 1) from v = 4 upwards.

    Privacy: the distance from a mechanism whose noise has at least the sum of the variances.
    """
    if summands <= 1:
        return 0.0
    if variance < _SMALLEST:
        return 1.0
    theta = 2 * sum(math.exp(-((math.pi * i) ** 2) * variance) for i in range(1, _TERMS + 1))
    exponent = (summands - 1) * math.log1p(theta)
    return 1.0 if exponent > 1 else min(1.0, 0.5 * math.expm1(exponent))


def slack(epsilon: float, total: float) -> float:
    """Return (1 + e^ε)·total, what a total variation distance adds to δ.

    Args:
        epsilon: ε of the promise.
        total: the distance of all entries of all releases together, their sum.

    Limits: no distance gives 0 for every ε; ε above 700 with a distance gives inf.
    """
    if total == 0:
        return 0.0
    return math.inf if epsilon > 700 else (1 + math.exp(epsilon)) * total
