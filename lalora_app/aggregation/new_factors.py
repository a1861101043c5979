"""Rules that choose new factors for the mean of the clients' products: FlexLoRA, FedSVD, DEeR."""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs, kind
from lalora_app.adapter.low_rank import Float64Array, balanced_factors, sum_of_products, svd
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo, normalised_weights
from lalora_app.settings.run_config import MethodNumbers


def average_except_factors(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter]
) -> Adapter:
    """Return ``current`` with the mean of everything that travelled but the factors."""
    heads = [{n: x for n, x in up.items() if kind(n) not in ("A", "B")} for up in uploads]
    return weighted_mean(current, weights, heads)


def product_mean(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FlexLoRA: the best factors for Σ p_k B_k A_k (arXiv:2402.11505, §3).

    Args:
        current: the global adapter; its rank is what is kept.
        weights: of the clients.
        uploads: both factors, of any ranks.
        info: of the round.

    Returns:
        B = U√Σ, A = √ΣVᵀ; the paper puts Σ into B, which makes the factors' learning rates
        incomparable. The error is the root of the sum of squares of the truncated singular values.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, shares = average_except_factors(current, weights, uploads), normalised_weights(weights)
    for b, a in factor_pairs(current):
        found = svd(
            sum_of_products((p, up[b], up[a]) for p, up in zip(shares, uploads, strict=True))
        )
        merged[b], merged[a] = balanced_factors(found, current[a].shape[0])
        unused = ~merged[b].any(axis=0)  # with both factors zero they would stay so for good
        merged[a][unused] = current[a][unused]
    return Aggregated(merged)


def svd_of_mean_b(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FedSVD: B̄A = UΣVᵀ; A becomes Vᵀ, with orthonormal rows, and B becomes UΣ (arXiv:2505.12805).

    Every ``rule.period`` rounds; other rounds average B as FFA-LoRA does. Exact: A is common to
    all clients, and the product keeps its rank. Limit: B̄ = 0 leaves A as it is.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    if info.t % info.numbers.period:
        return Aggregated(merged)
    for b, a in factor_pairs(current):
        found = svd(sum_of_products([(1.0, merged[b], merged[a])]))
        rank = merged[a].shape[0]
        if found.s[0] > 0:
            merged[b] = (found.u[:, :rank] * found.s[:rank]).astype(np.float32)
            merged[a] = found.vt[:rank].astype(np.float32)
    return Aggregated(merged)


def orthonormal_rows(a: Array | Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return (L (r, r), Q (r, n)) with L·Q = a and orthonormal rows in Q, r ≤ n."""
    q, r = np.linalg.qr(np.asarray(a, np.float64).T)
    return r.T, q.T


def _with_orthonormal(adapter: Adapter, resting: str) -> Adapter:
    """Return the same products with orthonormal resting factors: rows of A, or columns of B."""
    changed = dict(adapter)
    for b, a in factor_pairs(adapter):
        if resting == "A":
            mix, q = orthonormal_rows(adapter[a])
            left, right = adapter[b].astype(np.float64) @ mix, q
        else:
            mix, q = orthonormal_rows(adapter[b].T)
            left, right = q.T, mix.T @ adapter[a].astype(np.float64)
        changed[b], changed[a] = left.astype(np.float32), right.astype(np.float32)
    return changed


def start_orthonormal(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """Return the initial adapter with orthonormal rows in A; B is zero and stays so."""
    return _with_orthonormal(start, "A")


def orthonormal_resting_factor(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """DEeR made right: clip and noise in the geometry of the product (arXiv:2410.12926, corrected).

    The paper shapes the noise of B as N·Aᵀ(AAᵀ)⁻¹, but clips ΔB itself, so its sensitivity is not
    the one that the noise is made for. With orthonormal rows in A, ‖ΔB·A‖_F = ‖ΔB‖_F: the plain
    clip and the plain noise of the run are the product's own. So the server passes on equal
    products whose resting factor is orthonormal, and the clients run the ordinary private step.

    Privacy: a change of coordinates by noised factors; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    return Aggregated(_with_orthonormal(merged, "B" if info.t % 2 else "A"))
