"""Rules for several tasks in one run: SD-LoRA and DualLoRA.

A task is a block of consecutive rounds; a run has ``rule.tasks`` blocks of equal length. At the end
of a task the trained factors are frozen and new factors start.
"""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs, sibling
from lalora_app.adapter.low_rank import RANK_TOLERANCE, Float64Array, sum_of_products, svd
from lalora_app.adapter.parametrisations import (
    fixed_b_name,
    rank_mask_name,
    rank_of_task,
    split_rows_by_basis,
)
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.fold_into_base import reinitialised
from lalora_app.aggregation.rule import Aggregated, RoundInfo

# DualLoRA: a direction is added to the basis if the sine of its angle to the basis exceeds this.
NEW_DIRECTION_SINE = 1e-3
Product = tuple[Array, Array]  # B (m, r) and A (r, n)


def _task_index(t: int, info: RoundInfo) -> int:
    """Return the number of the task (from 0) that round ``t`` belongs to."""
    return (t - 1) * info.numbers.tasks // info.rounds


def finished_task(info: RoundInfo) -> int | None:
    """Return the number of the task (from 0) that ends with this round; None if none ends.

    The last task of a run is never frozen: its factors are the result of the run.
    """
    task = _task_index(info.t, info)
    return task if info.t < info.rounds and _task_index(info.t + 1, info) > task else None


def _combination(
    direction: Product, frozen: Sequence[Product], tolerance: float
) -> Float64Array | None:
    """Return c with Σ_i c_i·D_i nearest to D; None if what is left is above the tolerance.

    Args:
        direction: (B, A) of D.
        frozen: (B, A) of the earlier directions D_i.
        tolerance: largest ‖D − Σ_i c_i·D_i‖_F / ‖D‖_F.

    Limit: without earlier directions, or for D = 0, None.
    """
    gram = np.array([[_inner(one, other) for other in frozen] for one in frozen])
    right = np.array([_inner(one, direction) for one in frozen])
    size = _inner(direction, direction)
    if not frozen or size == 0:
        return None
    found: Float64Array = np.linalg.lstsq(gram, right, rcond=None)[0]
    left = max(size - 2 * found @ right + found @ gram @ found, 0.0)
    return found if left <= tolerance**2 * size else None


def _inner(one: Product, other: Product) -> float:
    """Return ⟨B·A, B'·A'⟩ of two products, from matrices of size r × r only."""
    (b, a), (c, d) = ([x.astype(np.float64) for x in product] for product in (one, other))
    return float(np.sum((b.T @ c) * (a @ d.T)))


def _freeze(merged: Adapter, b: str, a: str, task: int, tolerance: float) -> None:
    """Move the direction of a task among the frozen ones of a layer, or into their magnitudes.

    Args:
        merged: the global adapter, changed in place.
        b: name of the layer's B.
        a: name of the layer's A, without the directions of its mask.
        task: number of the task, from 0.
        tolerance: largest relative distance of a direction that earlier ones replace; 0: none.
    """
    rank, names = len(merged[a]), (fixed_b_name(b), sibling(a, "fixed"), sibling(a, "gate"))
    left, right, magnitudes = (merged[name].copy() for name in names)
    places = [slice(i * rank, (i + 1) * rank) for i in range(task + 1)]
    earlier = [(left[:, place], right[place]) for place in places[:task]]
    shares = _combination((merged[b], merged[a]), earlier, tolerance) if tolerance else None
    if shares is not None:
        magnitudes[:task] += shares
    else:
        sizes = [float(np.linalg.norm(merged[name])) or 1.0 for name in (b, a)]
        left[:, places[task]], right[places[task]] = merged[b] / sizes[0], merged[a] / sizes[1]
        magnitudes[task] = sizes[0] * sizes[1]
    merged.update(zip(names, (left, right, magnitudes), strict=True))


def freeze_direction(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """SD-LoRA: average; at the end of a task freeze B/‖B‖ and A/‖A‖ with the magnitude ‖B‖·‖A‖.

    The frozen product equals B·A (arXiv:2501.13198, eq. 4). The trained factors are reinitialised.
    With ``rule.merge-tolerance`` a product near to the span of earlier directions is not kept: its
    least-squares coefficients are added to their magnitudes (the variant KD). With
    ``rule.task-rank-decay`` each later task has fewer directions (the variant RR).
    Limit: a zero factor is divided by 1.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, task = weighted_mean(current, weights, uploads), finished_task(info)
    if task is None:
        return Aggregated(merged)
    for b, a in factor_pairs(current):
        if (mask := merged.get(rank_mask_name(b))) is not None:
            merged[a] = merged[a] * mask[:, None]
            kept = rank_of_task(len(mask), task + 1, info.numbers)
            merged[rank_mask_name(b)] = (np.arange(len(mask)) < kept).astype(np.float32)
        _freeze(merged, b, a, task, info.numbers.merge_tolerance)
    return Aggregated(reinitialised(merged, info))


def _extended_basis(basis: Array, place: slice, directions: Float64Array) -> Array:
    """Add the directions outside of a basis to it.

    Args:
        basis: rows (k, n), orthonormal or zero.
        place: the zero rows of ``basis`` that may be filled.
        directions: orthonormal rows (l, n).

    Returns:
        The extended basis; its rows are orthonormal or zero. A direction inside the old basis is
        not added: its part outside is a rounding error with a random direction. Half of a later
        task's rows are inside, see ``parametrisations.projected_factors``.
    """
    inside = basis.astype(np.float64)
    outside = directions - (directions @ inside.T) @ inside
    _, sines, rows = np.linalg.svd(outside, full_matrices=False)
    found = rows[sines > NEW_DIRECTION_SINE]
    grown = basis.copy()
    grown[place][: len(found)] = found
    return grown


def freeze_subspace(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """DualLoRA: average; at the end of a task add the product to the base and extend the basis Φ.

    The right singular vectors of the product become rows of Φ (arXiv:2411.00623, with noised
    updates in place of raw features). The trained factors are reinitialised.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, task = weighted_mean(current, weights, uploads), finished_task(info)
    if task is None:
        return Aggregated(merged)
    fold: Adapter = {}
    for b, a in factor_pairs(current):
        basis, rank = merged[sibling(a, "fixed")], len(merged[a])
        fold[b], fold[a] = merged[b], np.concatenate(split_rows_by_basis(merged[a], basis))
        found = svd(sum_of_products([(1.0, fold[b], fold[a])]))
        used = found.vt[found.s > RANK_TOLERANCE * found.s[0]]  # empty for a zero product
        place = slice(task * rank, (task + 1) * rank)
        merged[sibling(a, "fixed")] = _extended_basis(basis, place, used)
    return Aggregated(reinitialised(merged, info), fold)
