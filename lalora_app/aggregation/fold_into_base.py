"""Rules that move what was learnt into the base and start over: FLoRA, RAC-LoRA, subspaces."""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.new_factors import average_except_factors, orthonormal_rows
from lalora_app.aggregation.rule import Aggregated, RoundInfo, normalised_weights
from lalora_app.privacy.randomness import seeded


def random_a(shape: tuple[int, ...], info: RoundInfo, name: str) -> Array:
    """Draw A (r, n) as PEFT does, U(−1/√n, 1/√n), from the run's seed and the round; no data."""
    bound = shape[1] ** -0.5
    rng = seeded(info.seed, "fresh A", info.t, name)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def reinitialised(merged: Adapter, info: RoundInfo) -> Adapter:
    """Return the adapter with new A and zero B."""
    fresh = dict(merged)
    for b, a in factor_pairs(merged):
        fresh[b], fresh[a] = np.zeros_like(merged[b]), random_a(merged[a].shape, info, a)
    return fresh


def _block_ends(info: RoundInfo) -> bool:
    """Tell whether a block of ``rule.period`` rounds ends here."""
    return info.t % info.numbers.period == 0


def stack_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FLoRA: move Σ p_k B_k A_k into the base as one stack, and start anew (arXiv:2409.05976).

    Exact. Ranks may differ. Weight and scale stand on one side of the product only. Every round is
    a block of its own, so ``rule.period`` plays no part. All clients of a round share its new A.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    shares, fold = normalised_weights(weights), Adapter()
    for b, a in factor_pairs(current):
        lefts = [p * up[b].astype(np.float64) for p, up in zip(shares, uploads, strict=True)]
        fold[b] = np.concatenate(lefts, axis=1).astype(np.float32)
        fold[a] = np.concatenate([up[a] for up in uploads])
    merged = average_except_factors(current, weights, uploads)
    return Aggregated(reinitialised(merged, info), fold)


def chain_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """RAC-LoRA: W += s·B̄·A at the end of a block, then a new random frozen A (arXiv:2410.08305).

    Exact: A is common to all clients. A block is ``rule.period`` rounds.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    if not _block_ends(info):
        return Aggregated(merged)
    fold = {name: merged[name] for pair in factor_pairs(merged) for name in pair}
    return Aggregated(reinitialised(merged, info), fold)


def subspace_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """Average weights that were trained in a subspace: GaLore made private (arXiv:2410.23111).

    The resting factor is the projector P. What was trained in its subspace moves into the base;
    the next projector, on the other side, spans the noised mean update just received. The paper's
    own is the SVD of a raw gradient, which is a release without noise.

    Exact. What travels is the trained factor, which says as much as the whole weight.

    Privacy: the projector is a seed's at first, and made of noised uploads later; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    fold = {name: merged[name] for pair in factor_pairs(merged) for name in pair}
    for b, a in factor_pairs(current):
        if info.t % 2:  # B was trained; its columns span the next projector
            projector = orthonormal_rows(merged[b].T)[1].T
            merged[b], merged[a] = projector.astype(np.float32), np.zeros_like(merged[a])
        else:
            projector = orthonormal_rows(merged[a])[1]
            merged[a], merged[b] = projector.astype(np.float32), np.zeros_like(merged[b])
    return Aggregated(merged, fold)
