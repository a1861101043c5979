"""Rules that make up for what averaging the factors apart loses: FedEx-LoRA, LoRA-FAIR."""

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

# (what ΔW lacks (m, R)·(R, n), B̄ (m, r), Ā (r, n), round) -> ΔB (m, r)
Correction = Callable[[Product, Float64Array, Float64Array, RoundInfo], Float64Array]


def _averaging_residual(
    merged: Adapter, shares: Float64Array, uploads: Sequence[Adapter], b: str, a: str
) -> Product:
    """Return Σ p_k B_k A_k − B̄Ā as Σ p_k (B_k − B̄)(A_k − Ā), which does not cancel."""
    b_mean, a_mean = (merged[name].astype(np.float64) for name in (b, a))
    clients = zip(shares, uploads, strict=True)
    return sum_of_products((p, up[b] - b_mean, up[a] - a_mean) for p, up in clients)


def residual_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FedEx-LoRA: average the factors and move Σ p_k B_k A_k − B̄Ā into the base (arXiv:2410.09432).

    Exact; the residual's rank is at most that of all clients together, and travels down.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, shares = weighted_mean(current, weights, uploads), normalised_weights(weights)
    fold: Adapter = {}
    for b, a in factor_pairs(current):
        found = svd(_averaging_residual(merged, shares, uploads, b, a))
        fold[b], fold[a] = balanced_factors(found, numerical_rank(found))
    return Aggregated(merged, fold)


def ridge_correction(
    lacking: Product, b_mean: Float64Array, a_mean: Float64Array, info: RoundInfo
) -> Float64Array:
    """Return argmin_D ‖lacking − D·Ā‖² + λ‖D‖², in closed form.

    λ is ``rule.fair-weight`` times the mean squared singular value of Ā. λ → ∞: no correction.
    Where λ = 0 leaves D open, it is the smallest.
    """
    if math.isinf(info.numbers.fair_weight):
        return np.zeros_like(b_mean)
    gram = a_mean @ a_mean.T  # (r, r)
    weight = info.numbers.fair_weight * np.trace(gram) / len(gram)
    pulled = lacking.left @ (lacking.right @ a_mean.T)  # (m, r)
    return np.asarray(np.linalg.lstsq(gram + weight * np.eye(len(gram)), pulled.T)[0].T)


_COSINE_STEPS, _COSINE_RATE = 100, 0.01


def cosine_correction(
    lacking: Product, b_mean: Float64Array, a_mean: Float64Array, info: RoundInfo
) -> Float64Array:
    """Return D that gradient descent finds for 1 − cos(ΔW, (B̄+D)Ā) + λ‖D‖ (arXiv:2411.14961).

    λ is ``rule.fair-weight``; steps and rate are relative to ‖B̄‖, the paper gives none. The best
    iterate counts, so it is never worse by this loss than D = 0. λ → ∞: no correction.
    """
    gram = a_mean @ a_mean.T
    root = np.linalg.qr(a_mean.T)[1]  # gram = rootᵀ·root
    goal = lacking.left @ (lacking.right @ a_mean.T) + b_mean @ gram  # ΔW·Āᵀ, (m, r)
    whole = frobenius_norm(
        sum_of_products([(1.0, lacking.left, lacking.right), (1.0, b_mean, a_mean)])
    )
    unit, free = np.linalg.norm(b_mean), math.isfinite(info.numbers.fair_weight)
    change = best = np.zeros_like(b_mean)
    lowest = np.inf
    for _ in range(_COSINE_STEPS if free and whole > 0 else 0):
        x, size = b_mean + change, np.linalg.norm(change)
        length = np.linalg.norm(x @ root.T)  # of x·Ā
        if length == 0:  # no direction to turn
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

    Approximate, base and wire as with plain averaging (arXiv:2411.14961, eq. 8).

    Args:
        correction: :func:`ridge` or :func:`cosine`.

    Privacy: post-processing of noised uploads; no extra cost.
    """

    def rule(
        current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
    ) -> Aggregated:
        merged, shares = weighted_mean(current, weights, uploads), normalised_weights(weights)
        for b, a in factor_pairs(current):
            b_mean, a_mean = (merged[name].astype(np.float64) for name in (b, a))
            lacking = _averaging_residual(merged, shares, uploads, b, a)
            change = correction(lacking, b_mean, a_mean, info)
            merged[b] = (b_mean + change).astype(np.float32)
        return Aggregated(merged)

    return rule
