"""Rules that correct the error of averaging A and B separately: FedEx-LoRA, LoRA-FAIR.

The mean product is Σ p_k B_k A_k; separate averages give B̄·Ā. The residual is their difference.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs
from lalora_app.adapter.low_rank import (
    Float64Array,
    Product,
    balanced_factors,
    frobenius_norm,
    numerical_rank,
    sum_of_products,
    svd,
)
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo, normalised_weights

# (residual (m, R)·(R, n), B̄ (m, r), Ā (r, n), round) -> ΔB (m, r), to be added to B̄
Correction = Callable[[Product, Float64Array, Float64Array, RoundInfo], Float64Array]


def _averaging_residual(
    merged: Adapter, shares: Float64Array, uploads: Sequence[Adapter], b: str, a: str
) -> Product:
    """Return the residual Σ p_k B_k A_k − B̄Ā of one layer.

    Computed as Σ p_k (B_k − B̄)(A_k − Ā), which is equal and has no cancellation.
    """
    b_mean, a_mean = (merged[name].astype(np.float64) for name in (b, a))
    clients = zip(shares, uploads, strict=True)
    return sum_of_products((p, up[b] - b_mean, up[a] - a_mean) for p, up in clients)


def residual_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FedEx-LoRA: average the factors and add the residual to the base (arXiv:2410.09432).

    The new product is exactly Σ p_k B_k A_k. The rank of the residual is at most the sum of the
    clients' ranks. With ``rule.residual-rank`` = k > 0 only its k largest directions move into the
    base and travel; the error is then the root of the sum of squares of the others.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, shares = weighted_mean(current, weights, uploads), normalised_weights(weights)
    fold: Adapter = {}
    for b, a in factor_pairs(current):
        found = svd(_averaging_residual(merged, shares, uploads, b, a))
        whole = numerical_rank(found)
        fold[b], fold[a] = balanced_factors(found, min(whole, info.numbers.residual_rank or whole))
    return Aggregated(merged, fold)


def ridge_correction(
    residual: Product, b_mean: Float64Array, a_mean: Float64Array, info: RoundInfo
) -> Float64Array:
    """Return argmin_D ‖residual − D·Ā‖² + λ‖D‖² (ridge regression), in closed form.

    λ is ``rule.fair-weight`` times the mean squared singular value of Ā. Limits: λ → ∞ gives
    D = 0; λ = 0 gives the least-squares solution of smallest norm.

    Args:
        residual: the residual of one layer, see :func:`_averaging_residual`.
        b_mean: B̄ (m, r).
        a_mean: Ā (r, n).
        info: the round and the settings.
    """
    if math.isinf(info.numbers.fair_weight):
        return np.zeros_like(b_mean)
    gram = a_mean @ a_mean.T  # (r, r)
    weight = info.numbers.fair_weight * np.trace(gram) / len(gram)
    pulled = residual.left @ (residual.right @ a_mean.T)  # (m, r)
    return np.asarray(np.linalg.lstsq(gram + weight * np.eye(len(gram)), pulled.T)[0].T)


_COSINE_STEPS, _COSINE_RATE = 100, 0.01


def cosine_correction(
    residual: Product, b_mean: Float64Array, a_mean: Float64Array, info: RoundInfo
) -> Float64Array:
    """Minimise 1 − cos(ΔW, (B̄+D)Ā) + λ‖D‖ over D by gradient descent (arXiv:2411.14961).

    ΔW is the mean product, residual + B̄Ā, and λ is ``rule.fair-weight``. The paper gives neither
    the number of steps nor the step size; here they are constants, and the step size is relative
    to ‖B̄‖². Returned is the iterate of lowest loss, so the loss is at most that of D = 0.
    Limit: λ → ∞ gives D = 0.

    Args:
        residual: the residual of one layer, see :func:`_averaging_residual`.
        b_mean: B̄ (m, r).
        a_mean: Ā (r, n).
        info: the round and the settings.
    """
    gram = a_mean @ a_mean.T
    root = np.linalg.qr(a_mean.T)[1]  # gram = rootᵀ·root
    goal = residual.left @ (residual.right @ a_mean.T) + b_mean @ gram  # ΔW·Āᵀ, (m, r)
    whole = frobenius_norm(
        sum_of_products([(1.0, residual.left, residual.right), (1.0, b_mean, a_mean)])
    )
    unit, free = np.linalg.norm(b_mean), math.isfinite(info.numbers.fair_weight)
    change = best = np.zeros_like(b_mean)
    lowest = np.inf
    for _ in range(_COSINE_STEPS if free and whole > 0 else 0):
        x, size = b_mean + change, np.linalg.norm(change)
        length = np.linalg.norm(x @ root.T)  # ‖x·Ā‖
        if length == 0:  # the cosine of a zero product is undefined
            break
        along = np.sum(goal * x)
        loss = 1 - along / (whole * length) + info.numbers.fair_weight * size
        if loss < lowest:
            lowest, best = loss, change
        slope = (along / length**2 * (x @ gram) - goal) / (whole * length)
        pull = info.numbers.fair_weight * change / size if size > 0 else 0.0
        change = change - _COSINE_RATE * unit**2 * (slope + pull)
    return best


def corrected_average(correction: Correction) -> Callable[..., Aggregated]:
    """Return LoRA-FAIR's rule: average the factors, then add a correction to B̄.

    The new product approximates Σ p_k B_k A_k (arXiv:2411.14961, eq. 8). The base weights and the
    size of messages are the same as with federated averaging.

    Args:
        correction: the function of one layer that computes ΔB, :func:`ridge_correction` or
            :func:`cosine_correction`.

    Privacy: post-processing of noised uploads; no extra cost.
    """

    def rule(
        current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
    ) -> Aggregated:
        merged, shares = weighted_mean(current, weights, uploads), normalised_weights(weights)
        for b, a in factor_pairs(current):
            b_mean, a_mean = (merged[name].astype(np.float64) for name in (b, a))
            residual = _averaging_residual(merged, shares, uploads, b, a)
            change = correction(residual, b_mean, a_mean, info)
            merged[b] = (b_mean + change).astype(np.float32)
        return Aggregated(merged)

    return rule
