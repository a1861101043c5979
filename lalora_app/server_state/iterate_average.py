"""The running average of the global adapters of a run, ``server.average``.

It averages the head and the products B·A; the mean of the products is not the product of the means
of B and A. Training does not read the average.
"""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs
from lalora_app.adapter.low_rank import balanced_factors, numerical_rank, sum_of_products, svd
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Server

KEPT_RANKS = 4  # largest rank of the running average, in units of the adapter's rank


def _weight(averaging: tuple[str, Fraction], state: ServerState, attempts: int) -> float:
    """Return the weight of the state's adapter in the new average; 0 before the average begins."""
    (kind, number), count = averaging, state.averaged + 1
    if kind == "ema":
        decay = float(number)
        return (1 - decay) / (1 - decay**count)
    return 1 / count if state.attempts > attempts - ceil(number * attempts) else 0.0


def _mixed(average: Adapter, adapter: Adapter, weight: float) -> Adapter:
    """Return (1 − w)·average + w·adapter, in the terms of products and heads.

    Limit: weight 1 returns the adapter's own tensors.
    """
    if weight == 1:
        return dict(adapter)
    mixed = {
        name: ((1 - weight) * average[name].astype(np.float64) + weight * array).astype(np.float32)
        for name, array in adapter.items()
        if name not in _factor_names(adapter)
    }
    for b, a in factor_pairs(adapter):
        terms = [(1 - weight, average[b], average[a]), (weight, adapter[b], adapter[a])]
        found = svd(sum_of_products(terms))
        most = KEPT_RANKS * len(adapter[a])
        mixed[b], mixed[a] = balanced_factors(found, min(most, numerical_rank(found)))
    return mixed


def _factor_names(adapter: Adapter) -> set[str]:
    return {name for pair in factor_pairs(adapter) for name in pair}


def with_average(settings: Server, state: ServerState, attempts: int) -> ServerState:
    """Return the state after a successful aggregation with its adapter added to the average.

    ``ema:D`` is x̄ₖ = Σᵢ Dᵏ⁻ⁱ xᵢ / Σᵢ Dᵏ⁻ⁱ over all rounds i ≤ k: the exponential average, corrected
    for its start at zero. ``tail:F`` is the uniform mean of the rounds that were aggregated in the
    last ⌈F·N⌉ of N attempts; a failed attempt is one of the N and adds nothing.

    The average of T products of rank r can have rank T·r. It is kept as factors of rank at most
    4r: after each round, singular values beyond it are cut off. If τₜ is the Frobenius norm of
    what round t cuts off, the average differs from the exact one by at most Σ τₜ. Limit: exact up
    to rounding while the rank is at most 4r, so for all methods whose A never changes.

    Args:
        settings: the table ``server`` of the run config.
        state: the state after the aggregation.
        attempts: number of attempts of the run, ``num-server-rounds``.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    averaging = settings.averaging
    weight = _weight(averaging, state, attempts) if averaging else 0.0
    if weight == 0:
        return state
    average = _mixed(state.average, state.adapter, weight)
    return replace(state, average=average, averaged=state.averaged + 1)


def final_adapter(state: ServerState) -> Adapter:
    """Return the adapter that is evaluated and saved: the average, at the rank of the run.

    Its product is the best approximation of the average product of that rank. Limits: without an
    average yet, the global adapter itself; an average of one adapter is that adapter.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    if state.averaged == 0:
        return state.adapter
    final = dict(state.average)
    for b, a in factor_pairs(state.adapter):
        rank = len(state.adapter[a])
        if len(final[a]) != rank:
            found = svd(sum_of_products([(1.0, final[b], final[a])]))
            final[b], final[a] = balanced_factors(found, rank)
    return final
