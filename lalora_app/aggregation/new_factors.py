"""Rules that compute new factors of the mean product: FlexLoRA, FedSVD, DEeR."""

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
    """Return ``current`` with the weighted means of all uploaded tensors except A and B."""
    heads = [{n: x for n, x in up.items() if kind(n) not in ("A", "B")} for up in uploads]
    return weighted_mean(current, weights, heads)


def product_mean(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FlexLoRA: truncate the SVD of Σ p_k B_k A_k to the run's rank (arXiv:2402.11505, §3).

    Args:
        current: the global adapter, of the run's rank.
        weights: one positive weight per client.
        uploads: both factors of every client, of any ranks.
        info: the round and the settings; not used.

    Returns:
        B = U√Σ, A = √ΣVᵀ. The paper uses B = UΣ, A = Vᵀ; with equal norms, one learning rate suits
        both factors. The error in Frobenius norm is the root of the sum of squares of the
        truncated singular values.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, shares = average_except_factors(current, weights, uploads), normalised_weights(weights)
    for b, a in factor_pairs(current):
        found = svd(
            sum_of_products((p, up[b], up[a]) for p, up in zip(shares, uploads, strict=True))
        )
        merged[b], merged[a] = balanced_factors(found, current[a].shape[0])
        unused = ~merged[b].any(axis=0)  # a zero pair has zero gradients, so it would never train
        merged[a][unused] = current[a][unused]
    return Aggregated(merged)


def svd_of_mean_b(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FedSVD: B̄A = UΣVᵀ; A becomes Vᵀ, with orthonormal rows, and B becomes UΣ (arXiv:2505.12805).

    Runs every ``rule.period`` rounds; the other rounds only average B. The product stays exactly
    B̄A: all clients have the same A, and its rank is at most r. Limit: B̄ = 0 leaves A unchanged.

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
    """Return (L (r, r), Q (r, n)) with L·Q = ``a`` (r, n) and orthonormal rows in Q; r ≤ n."""
    q, r = np.linalg.qr(np.asarray(a, np.float64).T)
    return r.T, q.T


def _with_orthonormal(adapter: Adapter, resting: str) -> Adapter:
    """Return factors of the same products, one of them orthonormal.

    Args:
        adapter: the adapter.
        resting: the factor that the next round does not train: "A" gets orthonormal rows, "B"
            orthonormal columns.
    """
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
    """Return the initial adapter with orthonormal rows in A; B stays zero."""
    return _with_orthonormal(start, "A")


def orthonormal_resting_factor(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """DEeR, corrected: average and make the next resting factor orthonormal (arXiv:2410.12926).

    The resting factor is the one that the next round does not train. The paper shapes the noise of
    B as N·Aᵀ(AAᵀ)⁻¹ but clips ΔB, so the noise does not match the sensitivity. With orthonormal
    rows in A, ‖ΔB·A‖_F = ‖ΔB‖_F: clipping and noise of the ordinary private step act on the
    product too. The product itself does not change.

    Privacy: a change of coordinates that depends on noised factors only; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    return Aggregated(_with_orthonormal(merged, "B" if info.t % 2 else "A"))
