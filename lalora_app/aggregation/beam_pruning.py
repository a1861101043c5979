"""BeamLoRA's server rule: replace rank-one directions of low gate by copies of high gate."""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs, sibling
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo

KEPT_GATE_MASS = 0.95  # share of the softmax of the gates that is never pruned


def _pruned_and_copied(gate: Array, temperature: float) -> tuple[list[int], list[int]]:
    """Return the indices to prune, lowest gate first, and equally many to copy, highest first."""
    order = np.argsort(-gate, kind="stable")  # gates, as softmax weights may underflow
    mass = np.cumsum(np.exp((gate[order] - gate.max()) / temperature))
    kept = int(np.searchsorted(mass, KEPT_GATE_MASS * mass[-1]) + 1)
    weaker = int((gate < gate[order[kept - 1]]).sum())  # gates below every kept gate
    pruned = min(weaker, len(gate) // 2)
    return [int(i) for i in order[::-1][:pruned]], [int(i) for i in order[:pruned]]


def prune_and_expand(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """BeamLoRA: average; every ``rule.period`` rounds replace low-gate directions by copies.

    Kept are the fewest directions that hold 95 % of the gates' softmax, and at least half of all
    directions. A copy and its source both get the mean of their two gates (arXiv:2502.13604,
    Alg. 1). The server decides, because directions with the same index must correspond to each
    other in all clients. Copies are taken from a snapshot of ⌊period/2⌋ rounds before, so that a
    copy differs from its source; the server keeps it, and no client receives it. Limits: equal
    gates prune nothing, at any rank; with a period of 1 copies are of the present factors.

    Privacy: gates and snapshot are means of noised uploads; no extra cost.
    """
    merged, period = weighted_mean(current, weights, uploads), info.numbers.period
    memory = info.memory
    if (info.t + period // 2) % period == 0:
        memory = {name: merged[name] for pair in factor_pairs(current) for name in pair}
    if info.t % period:
        return Aggregated(merged, memory=memory)
    for b, a in factor_pairs(current):
        name = sibling(a, "gate")
        weak, strong = _pruned_and_copied(merged[name], info.numbers.gate_temperature)
        changed = {n: merged[n].copy() for n in (b, a, name)}
        old_a, old_b = memory.get(a, merged[a]), memory.get(b, merged[b])
        changed[a][weak], changed[b][:, weak] = old_a[strong], old_b[:, strong]
        changed[name][weak] = changed[name][strong] = (
            merged[name][weak] + merged[name][strong]
        ) / 2
        merged |= changed
    return Aggregated(merged)
