"""Rules that close a task (SD-LoRA, DualLoRA), and BeamLoRA's that prunes and expands.

A run's rounds are ``rule.tasks`` blocks of equal length.
"""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, pairs, sibling
from lalora_app.adapter.low_rank import NEGLIGIBLE, stacked, svd
from lalora_app.adapter.parametrisations import fixed_b, split_rows
from lalora_app.aggregation.average import mean
from lalora_app.aggregation.fold_into_base import restarted
from lalora_app.aggregation.rule import Aggregated, Round, Wide

KEPT = 0.95  # BeamLoRA: the share of the gates' mass that may not be pruned
NEW = 1e-3  # DualLoRA: the sine of the angle to the basis from which on a direction is new


def _task(t: int, info: Round) -> int:
    return (t - 1) * info.numbers.tasks // info.rounds


def closed_task(info: Round) -> int | None:
    """Return the number of the task (from 0) that ends with this round; None: it goes on.

    The last task of a run stays open: its factors are the result.
    """
    task = _task(info.t, info)
    return task if info.t < info.rounds and _task(info.t + 1, info) > task else None


def freeze_direction(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: Round
) -> Aggregated:
    """SD-LoRA: average; at a task's end freeze B·A/(‖B‖‖A‖), with ‖B‖‖A‖ as its magnitude.

    The product stays what it was (arXiv:2501.13198, eq. 4); factors start anew.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, task = mean(current, weights, uploads), closed_task(info)
    if task is None:
        return Aggregated(merged)
    for b, a in pairs(current):
        rank = len(merged[a])
        place = slice(task * rank, (task + 1) * rank)
        sizes = [float(np.linalg.norm(merged[name])) or 1.0 for name in (b, a)]
        for name, own, size in ((fixed_b(b), b, sizes[0]), (sibling(a, "fixed"), a, sizes[1])):
            frozen = merged[name].copy()
            (frozen[:, place] if own == b else frozen[place])[...] = merged[own] / size
            merged[name] = frozen
        merged[sibling(a, "gate")] = merged[sibling(a, "gate")].copy()
        merged[sibling(a, "gate")][task] = sizes[0] * sizes[1]
    return Aggregated(restarted(merged, info))


def _grown(basis: Array, place: slice, directions: Wide) -> Array:
    """Return the basis with what is new to it in ``directions``, orthonormal rows or zeros.

    Only that: half of a later task's rows lie inside of the basis, and what remains of them is
    rounding, of any direction.
    """
    inside = basis.astype(np.float64)
    outside = directions - (directions @ inside.T) @ inside
    _, sines, rows = np.linalg.svd(outside, full_matrices=False)
    found = rows[sines > NEW]
    grown = basis.copy()
    grown[place][: len(found)] = found
    return grown


def freeze_subspace(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: Round
) -> Aggregated:
    """DualLoRA: average; at a task's end move the product into the base and its rows into Φ.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged, task = mean(current, weights, uploads), closed_task(info)
    if task is None:
        return Aggregated(merged)
    fold: Adapter = {}
    for b, a in pairs(current):
        basis, rank = merged[sibling(a, "fixed")], len(merged[a])
        fold[b], fold[a] = merged[b], np.concatenate(split_rows(merged[a], basis))
        found = svd(stacked([(1.0, fold[b], fold[a])]))
        used = found.vt[found.s > NEGLIGIBLE * found.s[0]]  # none of a zero product
        place = slice(task * rank, (task + 1) * rank)
        merged[sibling(a, "fixed")] = _grown(basis, place, used)
    return Aggregated(restarted(merged, info), fold)


def _sources(gate: Array, temperature: float) -> tuple[list[int], list[int]]:
    """Return the directions to prune, weakest first, and the strongest ones to copy."""
    order = np.argsort(-gate, kind="stable")  # of the gates: weights may all but vanish
    mass = np.cumsum(np.exp((gate[order] - gate.max()) / temperature))
    kept = int(np.searchsorted(mass, KEPT * mass[-1]) + 1)
    weaker = int((gate < gate[order[kept - 1]]).sum())  # than all that are kept
    pruned = min(weaker, len(gate) // 2)
    return [int(i) for i in order[::-1][:pruned]], [int(i) for i in order[:pruned]]


def prune_and_expand(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: Round
) -> Aggregated:
    """BeamLoRA: average; every ``rule.period`` rounds weak directions become copies of strong ones.

    The smallest set of directions with 95 % of the gates' softmax is kept, at least half of them;
    a copy and its source share their gates' mean (arXiv:2502.13604, Alg. 1). Decided here and not
    by clients, whose directions would no longer be each other's. Copies are of the present
    factors, not of a snapshot. Limit: equal gates prune nothing, at any rank.

    Privacy: decided by noised gates; no extra cost.
    """
    merged = mean(current, weights, uploads)
    if info.t % info.numbers.period:
        return Aggregated(merged)
    for b, a in pairs(current):
        name = sibling(a, "gate")
        weak, strong = _sources(merged[name], info.numbers.gate_temperature)
        changed = {n: merged[n].copy() for n in (b, a, name)}
        changed[a][weak], changed[b][:, weak] = merged[a][strong], merged[b][:, strong]
        changed[name][weak] = changed[name][strong] = (
            merged[name][weak] + merged[name][strong]
        ) / 2
        merged |= changed
    return Aggregated(merged)
