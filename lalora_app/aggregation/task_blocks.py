"""Rules that close a task (SD-LoRA, DualLoRA), and BeamLoRA's that prunes and expands.

A run's rounds are ``rule.tasks`` blocks of equal length.
"""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs, sibling
from lalora_app.adapter.low_rank import RANK_TOLERANCE, Float64Array, sum_of_products, svd
from lalora_app.adapter.parametrisations import fixed_b_name, split_rows_by_basis
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.fold_into_base import reinitialised
from lalora_app.aggregation.rule import Aggregated, RoundInfo

NEW_DIRECTION_SINE = (
    1e-3  # DualLoRA: the sine of the angle to the basis from which on a direction is new
)


def _task_index(t: int, info: RoundInfo) -> int:
    return (t - 1) * info.numbers.tasks // info.rounds


def finished_task(info: RoundInfo) -> int | None:
    """Return the number of the task (from 0) that ends with this round; None: it goes on.

    The last task of a run stays open: its factors are the result.
    """
    task = _task_index(info.t, info)
    return task if info.t < info.rounds and _task_index(info.t + 1, info) > task else None


def freeze_direction(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """SD-LoRA: average; at a task's end freeze B·A/(‖B‖‖A‖), with ‖B‖‖A‖ as its magnitude.

    The product stays what it was (arXiv:2501.13198, eq. 4); factors start anew.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, task = weighted_mean(current, weights, uploads), finished_task(info)
    if task is None:
        return Aggregated(merged)
    for b, a in factor_pairs(current):
        rank = len(merged[a])
        place = slice(task * rank, (task + 1) * rank)
        sizes = [float(np.linalg.norm(merged[name])) or 1.0 for name in (b, a)]
        for name, own, size in ((fixed_b_name(b), b, sizes[0]), (sibling(a, "fixed"), a, sizes[1])):
            frozen = merged[name].copy()
            (frozen[:, place] if own == b else frozen[place])[...] = merged[own] / size
            merged[name] = frozen
        merged[sibling(a, "gate")] = merged[sibling(a, "gate")].copy()
        merged[sibling(a, "gate")][task] = sizes[0] * sizes[1]
    return Aggregated(reinitialised(merged, info))


def _extended_basis(basis: Array, place: slice, directions: Float64Array) -> Array:
    """Return the basis with what is new to it in ``directions``, orthonormal rows or zeros.

    Only that: half of a later task's rows lie inside of the basis, and what remains of them is
    rounding, of any direction.
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
    """DualLoRA: average; at a task's end move the product into the base and its rows into Φ.

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
        used = found.vt[found.s > RANK_TOLERANCE * found.s[0]]  # none of a zero product
        place = slice(task * rank, (task + 1) * rank)
        merged[sibling(a, "fixed")] = _extended_basis(basis, place, used)
    return Aggregated(reinitialised(merged, info), fold)
