"""BeamLoRA's server rule: prune weak rank-one directions and copy strong ones."""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs, sibling
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo

KEPT_GATE_MASS = 0.95  # BeamLoRA: the share of the gates' mass that may not be pruned


def _pruned_and_copied(gate: Array, temperature: float) -> tuple[list[int], list[int]]:
    """Return the directions to prune, weakest first, and the strongest ones to copy."""
    order = np.argsort(-gate, kind="stable")  # of the gates: weights may all but vanish
    mass = np.cumsum(np.exp((gate[order] - gate.max()) / temperature))
    kept = int(np.searchsorted(mass, KEPT_GATE_MASS * mass[-1]) + 1)
    weaker = int((gate < gate[order[kept - 1]]).sum())  # than all that are kept
    pruned = min(weaker, len(gate) // 2)
    return [int(i) for i in order[::-1][:pruned]], [int(i) for i in order[:pruned]]


def prune_and_expand(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """BeamLoRA: average; every ``rule.period`` rounds weak directions become copies of strong ones.

    The smallest set of directions with 95 % of the gates' softmax is kept, at least half of them;
    a copy and its source share their gates' mean (arXiv:2502.13604, Alg. 1). Decided here and not
    by clients, whose directions would no longer be each other's. Copies are of the present
    factors, not of a snapshot. Limit: equal gates prune nothing, at any rank.

    Privacy: decided by noised gates; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    if info.t % info.numbers.period:
        return Aggregated(merged)
    for b, a in factor_pairs(current):
        name = sibling(a, "gate")
        weak, strong = _pruned_and_copied(merged[name], info.numbers.gate_temperature)
        changed = {n: merged[n].copy() for n in (b, a, name)}
        changed[a][weak], changed[b][:, weak] = merged[a][strong], merged[b][:, strong]
        changed[name][weak] = changed[name][strong] = (
            merged[name][weak] + merged[name][strong]
        ) / 2
        merged |= changed
    return Aggregated(merged)
