"""Spectra of matrices: intruder dimensions of an adapted weight, and a top eigenvalue."""

from collections.abc import Callable

import numpy as np

EPS = float(np.finfo(np.float64).eps)
CLOSED = 1e-12  # relative rest of a product that lies inside the Krylov space


def _left_singular_vectors(weight: np.ndarray) -> np.ndarray:
    """Return (m, rank): the left vectors of the singular values above rounding, largest first.

    Vectors of a zero singular value are left out: they are an arbitrary basis of the null space.
    """
    left, sizes, _ = np.linalg.svd(np.asarray(weight, dtype=np.float64), full_matrices=False)
    kept: np.ndarray = left[:, sizes > max(weight.shape) * EPS * sizes.max(initial=0.0)]
    return kept


def intruder_dimensions(
    base: np.ndarray, adapted: np.ndarray, *, top: int = 10, threshold: float = 0.5
) -> int:
    """Count the leading singular vectors that fine-tuning has added (arXiv:2410.21228).

    u_j of the adapted weight is an intruder if max_i |cos(u_j, u0_i)| < threshold over all left
    singular vectors u0_i of the base. Vectors of zero singular values are not defined and
    are left out on both sides.

    Args:
        base: (m, n), the weight before fine-tuning.
        adapted: (m, n), the weight after fine-tuning: base + s·B A.
        top: number of leading vectors of the adapted weight; limited by its rank.
        threshold: in (0, 1]; the paper's is 0.5.

    Returns:
        0 to ``top``: 0 if the weights are identical; all of them if the base is zero.

    Raises:
        ValueError: if the shapes differ, or ``top`` or ``threshold`` is out of its range.
        numpy.linalg.LinAlgError: if a weight is not finite.

    Privacy: the base is public and the adapted weight is made of noised gradients only.
    """
    _check(base, adapted, top)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1]")
    leading = _left_singular_vectors(adapted)[:, :top]  # (m, at most top)
    cosines = np.abs(_left_singular_vectors(base).T @ leading)  # (rank of the base, leading)
    return int(np.sum(cosines.max(axis=0, initial=0.0) < threshold))


def _check(base: np.ndarray, adapted: np.ndarray, top: int) -> None:
    if base.ndim != 2 or base.shape != adapted.shape:
        raise ValueError(f"weights of shapes {base.shape} and {adapted.shape} must be one (m, n)")
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")


def similarity(base: np.ndarray, adapted: np.ndarray, *, top: int) -> np.ndarray:
    """Return |cos(u0_i, u_j)| of the leading left singular vectors of two weights.

    Figure 2 of arXiv:2410.21228: near the identity after full fine-tuning; a column without a large
    entry is a direction that the base does not have among its leading ones.

    Args:
        base: (m, n), the weight before fine-tuning.
        adapted: (m, n), the weight after fine-tuning.
        top: number of leading vectors of each weight; limited by its rank.

    Returns:
        (top of the base, top of the adapted weight), each in [0, 1]; the identity if the weights
        are the same and have distinct singular values.

    Raises:
        ValueError: if the shapes differ, or ``top`` is below 1.

    Privacy: that of :func:`intruder_dimensions`.
    """
    _check(base, adapted, top)
    first, second = (_left_singular_vectors(weight)[:, :top] for weight in (base, adapted))
    found: np.ndarray = np.minimum(np.abs(first.T @ second), 1.0)
    return found


def _orthogonal(vector: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return (size,) without its part in the span of the orthonormal rows of ``basis``."""
    for _ in range(2):  # the second pass removes the rounding of the first
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _require_finite(vector: np.ndarray) -> None:
    if not np.isfinite(vector).all():
        count = int(np.sum(~np.isfinite(vector)))
        raise ValueError(f"matvec returned {count} entries that are not finite; all must be")


def lanczos_top(
    matvec: Callable[[np.ndarray], np.ndarray], size: int, *, steps: int, rng: np.random.Generator
) -> float:
    """Return the largest (algebraic) eigenvalue of a symmetric matrix, by Lanczos' iteration.

    Full re-orthogonalisation: Golub and Van Loan, Matrix Computations, 4th ed., section 10.3.
    The start vector is Gaussian, so it misses an eigenspace only with probability 0.

    Args:
        matvec: (size,) -> (size,) in float64: the matrix times a vector.
        size: number of rows of the matrix.
        steps: largest number of products; fewer if the Krylov space closes earlier.
        rng: random generator of the start vector.

    Returns:
        A value that never exceeds the eigenvalue by more than rounding, grows with ``steps``, and
        is exact for ``steps >= size``.

    Raises:
        ValueError: if ``size`` or ``steps`` is below 1, or a product is not finite.

    Privacy: that of ``matvec``; no noise is added here.
    """
    if size < 1 or steps < 1:
        raise ValueError(f"size={size} and steps={steps} must be at least 1")
    basis = np.empty((min(steps, size), size))
    tridiagonal = np.zeros((len(basis), len(basis)))
    vector = rng.standard_normal(size)
    for k in range(len(basis)):
        basis[k] = vector / np.linalg.norm(vector)
        product = matvec(basis[k])
        _require_finite(product)
        tridiagonal[k, k] = basis[k] @ product
        vector = _orthogonal(product, basis[: k + 1])
        left = float(np.linalg.norm(vector))
        if k + 1 == len(basis) or left <= CLOSED * np.abs(tridiagonal).max():
            break
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = left
    return float(np.linalg.eigvalsh(tridiagonal[: k + 1, : k + 1])[-1])
