"""Sums of products B·A without ever forming them: norms, factored SVD, compression.

A sum ``Σ_j c_j P_j Q_j`` is one product of the stacked factors, (m, R)·(R, n). With thin QR
factorisations of both sides everything about it follows from an R × R matrix (methods.md §4).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lalora_app.adapter.factors import Adapter, Array, factor_pairs

Float64Array = NDArray[np.float64]

RANK_TOLERANCE = 1e-7  # of the largest singular value: below what float32 factors can say


class Product(NamedTuple):
    """left (m, R) times right (R, n), in float64."""

    left: Float64Array
    right: Float64Array


class Svd(NamedTuple):
    """u (m, k), s (k,) falling, vt (k, n): a singular value decomposition."""

    u: Float64Array
    s: Float64Array
    vt: Float64Array


def sum_of_products(
    terms: Iterable[tuple[float, Array | Float64Array, Array | Float64Array]],
) -> Product:
    """Return Σ c·B·A over terms (c, B (m, r), A (r, n)) as one product; ranks add up."""
    lefts, rights = [], []
    for weight, b, a in terms:
        lefts.append(weight * np.asarray(b, np.float64))
        rights.append(np.asarray(a, np.float64))
    return Product(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))


def _with_fixed_signs(u: Float64Array, s: Float64Array, vt: Float64Array) -> Svd:
    """Make the largest entry of each left vector positive, so that results can be repeated."""
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Svd(u * signs, s, vt * signs[:, None])


def svd(product: Product) -> Svd:
    """Return the SVD of a product by QR of its sides; O(R²(m + n)), m × n is never formed.

    Limit: R ≥ min(m, n) costs more that way, and is decomposed as it is.
    """
    left, right = product
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return _with_fixed_signs(*np.linalg.svd(left @ right, full_matrices=False))
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    return _with_fixed_signs(q_left @ u, s, vt @ q_right.T)


def frobenius_norm(product: Product) -> float:
    """Return ‖left·right‖_F; accurate also where the terms of the sum cancel."""
    r_left = np.linalg.qr(product.left)[1]
    r_right = np.linalg.qr(product.right.T)[1]
    return float(np.linalg.norm(r_left @ r_right.T))


def balanced_factors(found: Svd, rank: int) -> tuple[Array, Array]:
    """Return float32 (B (m, rank), A (rank, n)) = (U√Σ, √ΣVᵀ), the best product of that rank.

    Both factors carry half of the scale, which keeps their learning rates comparable; columns
    fall in importance, so a smaller rank is the first of them. Zeros fill up a smaller product.
    """
    kept = min(rank, len(found.s))
    root = np.sqrt(found.s[:kept])
    b = np.zeros((found.u.shape[0], rank), np.float32)
    a = np.zeros((rank, found.vt.shape[1]), np.float32)
    b[:, :kept] = found.u[:, :kept] * root
    a[:kept] = root[:, None] * found.vt[:kept]
    return b, a


def numerical_rank(found: Svd) -> int:
    """Return how many singular values float32 factors can tell from zero; at least 1."""
    return max(1, int((found.s > RANK_TOLERANCE * found.s[0]).sum()))


def compressed_factors(b: Array, a: Array) -> tuple[Array, Array]:
    """Return a product's factors at the product's own rank: no larger than min(m, n)."""
    found = svd(sum_of_products([(1.0, b, a)]))
    return balanced_factors(found, numerical_rank(found))


def add_to_drift(drift: Adapter, fold: Adapter, scale: float) -> Adapter:
    """Return the drift of the base with ``scale·B·A`` of ``fold`` added.

    Ranks add up; beyond half of a layer's smaller side the product is compressed to its own rank.
    """
    total = dict(drift)
    for b, a in factor_pairs(fold):
        grown = sum_of_products([(scale, fold[b], fold[a])])
        if b in drift:
            grown = sum_of_products([(1.0, drift[b], drift[a]), (1.0, *grown)])
        left, right = (side.astype(np.float32) for side in grown)
        half = min(left.shape[0], right.shape[1]) // 2
        total[b], total[a] = (
            compressed_factors(left, right) if left.shape[1] > half else (left, right)
        )
    return total
