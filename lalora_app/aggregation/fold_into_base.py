"""Rules that add the trained product to the base, then restart: FLoRA, RAC-LoRA, GaLore."""

import hashlib
from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.new_factors import average_except_factors, orthonormal_rows
from lalora_app.aggregation.rule import Aggregated, RoundInfo, normalised_weights
from lalora_app.privacy.randomness import seeded
from lalora_app.settings.run_config import MethodNumbers


def random_a(shape: tuple[int, ...], info: RoundInfo, name: str) -> Array:
    """Draw A (r, n) from U(−1/√n, 1/√n), PEFT's initial distribution.

    The generator is seeded by the run's seed, the round and ``name``, and reads no data.
    """
    bound = shape[1] ** -0.5
    rng = seeded(info.seed, "fresh A", info.t, name)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def reinitialised(merged: Adapter, info: RoundInfo) -> Adapter:
    """Return the adapter with a new random A and a zero B in every layer."""
    fresh = dict(merged)
    for b, a in factor_pairs(merged):
        fresh[b], fresh[a] = np.zeros_like(merged[b]), random_a(merged[a].shape, info, a)
    return fresh


def _block_ends(info: RoundInfo) -> bool:
    """Return whether this round is the last of a block of ``rule.period`` rounds."""
    return info.t % info.numbers.period == 0


def stack_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """FLoRA: add Σ p_k B_k A_k to the base and reinitialise the factors (arXiv:2409.05976).

    The sum is exact: factors of all clients are concatenated, and p_k multiplies B_k only. Ranks
    may differ between clients. Every round is folded, so ``rule.period`` has no effect. All
    clients of the next round start from the same new A.

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

    A block has ``rule.period`` rounds. The mean is exact, because all clients have the same A.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    if not _block_ends(info):
        return Aggregated(merged)
    fold = {name: merged[name] for pair in factor_pairs(merged) for name in pair}
    return Aggregated(reinitialised(merged, info), fold)


def start_with_random_b(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """Return the initial adapter of the mirrored chain: a random B and a zero A in every layer.

    B (m, r) is drawn from U(−1/√m, 1/√m), the distribution of A with the sides exchanged, by a
    generator that the initial A seeds; so B depends on the run's seed and on no data.
    """
    mirrored = dict(start)
    for b, a in factor_pairs(start):
        seed, bound = hashlib.sha256(start[a].tobytes()).hexdigest(), len(start[b]) ** -0.5
        drawn = seeded(0, "first B", seed).uniform(-bound, bound, start[b].shape)
        mirrored[b], mirrored[a] = drawn.astype(np.float32), np.zeros_like(start[a])
    return mirrored


def mirrored_chain_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """RAC-LoRA's mirrored chain: W += s·B·Ā, then a new random frozen B (arXiv:2410.08305).

    As :func:`chain_fold` with the factors exchanged: A trains, from zero in every block of
    ``rule.period`` rounds. The mean is exact, because all clients have the same B.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    if not _block_ends(info):
        return Aggregated(merged)
    fold = {name: merged[name] for pair in factor_pairs(merged) for name in pair}
    fresh = dict(merged)
    for b, a in factor_pairs(merged):
        fresh[b] = np.ascontiguousarray(random_a(merged[b].T.shape, info, b).T)
        fresh[a] = np.zeros_like(merged[a])
    return Aggregated(fresh, fold)


def subspace_fold(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """GaLore with noised updates: average weight updates inside a subspace (arXiv:2410.23111).

    The factor that does not train in this round is the projector P; the trained factor is the
    weight update in its subspace. The product of both is added to the base. The next projector is
    an orthonormal basis of the mean update, and the other factor trains. The paper computes P by
    an SVD of a raw gradient, which would be a release without noise.

    The mean is exact, because all clients have the same projector.

    Privacy: the first projector depends on a seed only, later ones on noised uploads; no extra
    cost.
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
