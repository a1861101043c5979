"""Norm, SVD and compression of a sum of products B·A, without forming the (m, n) matrix.

A sum ``Σ_j c_j B_j A_j`` equals one product of concatenated factors, (m, R)·(R, n). After thin QR
factorisations of both sides, its norm and SVD follow from an R × R matrix.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lalora_app.adapter.factors import Adapter, Array, factor_pairs

Float64Array = NDArray[np.float64]

# Singular values below this share of the largest one are rounding errors of float32 factors.
RANK_TOLERANCE = 1e-7
# Above this share of ‖L‖²‖R‖², a squared norm of float64 Gram matrices has eleven right digits.
_GRAM_SHARE = 1e-4


class Product(NamedTuple):
    """The product of ``left`` (m, R) and ``right`` (R, n), in float64."""

    left: Float64Array
    right: Float64Array


class Svd(NamedTuple):
    """A singular value decomposition: u (m, k), s (k,) in falling order, vt (k, n)."""

    u: Float64Array
    s: Float64Array
    vt: Float64Array


def sum_of_products(
    terms: Iterable[tuple[float, Array | Float64Array, Array | Float64Array]],
) -> Product:
    """Return Σ c·B·A over the terms (c, B (m, r), A (r, n)) as one product; its rank is Σ r."""
    lefts, rights = [], []
    for weight, b, a in terms:
        lefts.append(weight * np.asarray(b, np.float64))
        rights.append(np.asarray(a, np.float64))
    return Product(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))


def _with_fixed_signs(u: Float64Array, s: Float64Array, vt: Float64Array) -> Svd:
    """Make the largest entry of each left singular vector positive: the signs become unique."""
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Svd(u * signs, s, vt * signs[:, None])


def svd(product: Product) -> Svd:
    """Return the SVD of a product by QR of both sides, in O(R²(m + n)) operations.

    Limit: for R ≥ min(m, n) the (m, n) matrix is formed and decomposed, which costs less.
    """
    left, right = product
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return _with_fixed_signs(*np.linalg.svd(left @ right, full_matrices=False))
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    return _with_fixed_signs(q_left @ u, s, vt @ q_right.T)


def _core(product: Product) -> Float64Array:
    """Return a matrix of at most R × R with the singular values of the product that are not 0."""
    r_left, r_right = (
        np.asarray(np.linalg.qr(m, mode="r")) for m in (product.left, product.right.T)
    )
    return np.asarray(r_left @ r_right.T)


def singular_values(product: Product) -> Float64Array:
    """Return the singular values of a product in falling order, as :func:`svd` does."""
    left, right = product
    small = left.shape[1] < min(left.shape[0], right.shape[1])
    matrix = _core(product) if small else left @ right
    return np.asarray(np.linalg.svd(matrix, compute_uv=False))


def frobenius_norm(product: Product) -> float:
    """Return ‖left·right‖_F; accurate also if the terms of the sum nearly cancel.

    ‖LR‖² = Σ (LᵀL)∘(RRᵀ) is fast, but rounding is relative to ‖L‖²‖R‖². A much smaller norm comes
    from QR factorisations of both sides.
    """
    left, right = product
    grams = left.T @ left, right @ right.T  # (R, R) each
    squared = float((grams[0] * grams[1]).sum())
    if squared > _GRAM_SHARE * np.trace(grams[0]) * np.trace(grams[1]):
        return math.sqrt(squared)
    return float(np.linalg.norm(_core(product)))


def balanced_factors(decomposition: Svd, rank: int) -> tuple[Array, Array]:
    """Return float32 (B (m, rank), A (rank, n)) = (U√Σ, √ΣVᵀ), the best product of that rank.

    Both factors get the square root of the singular values, so that one learning rate suits both.
    Columns are sorted by singular value, so the first columns are the best product of a smaller
    rank. Limit: a decomposition of fewer than ``rank`` values is padded with zeros.
    """
    kept = min(rank, len(decomposition.s))
    root = np.sqrt(decomposition.s[:kept])
    b = np.zeros((decomposition.u.shape[0], rank), np.float32)
    a = np.zeros((rank, decomposition.vt.shape[1]), np.float32)
    b[:, :kept] = decomposition.u[:, :kept] * root
    a[:kept] = root[:, None] * decomposition.vt[:kept]
    return b, a


def numerical_rank(decomposition: Svd) -> int:
    """Return the number of singular values above ``RANK_TOLERANCE``; at least 1."""
    return max(1, int((decomposition.s > RANK_TOLERANCE * decomposition.s[0]).sum()))


def compressed_factors(b: Array, a: Array) -> tuple[Array, Array]:
    """Return factors of the same product B·A with its numerical rank, at most min(m, n)."""
    decomposition = svd(sum_of_products([(1.0, b, a)]))
    return balanced_factors(decomposition, numerical_rank(decomposition))


def add_to_drift(drift: Adapter, fold: Adapter, scale: float) -> Adapter:
    """Add ``scale·B·A`` of ``fold`` to the drift of the frozen base weights.

    Args:
        drift: factors of the drift so far, per layer, without a scale.
        fold: factors of the new product, per layer.
        scale: the LoRA scale α/r of ``fold``.

    Ranks add up. A product whose rank exceeds half of min(m, n) is compressed to its numerical
    rank.
    """
    total = dict(drift)
    for b, a in factor_pairs(fold):
        product = sum_of_products([(scale, fold[b], fold[a])])
        if b in drift:
            product = sum_of_products([(1.0, drift[b], drift[a]), (1.0, *product)])
        left, right = (side.astype(np.float32) for side in product)
        half = min(left.shape[0], right.shape[1]) // 2
        total[b], total[a] = (
            compressed_factors(left, right) if left.shape[1] > half else (left, right)
        )
    return total
