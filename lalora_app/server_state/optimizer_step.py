"""The server's optimiser: one step along the mean update of a round, in place of the mean itself.

FedAvgM (Hsu et al., arXiv:1909.06335), FedAdam and FedYogi (Reddi et al., "Adaptive Federated
Optimization", arXiv:2003.00295, Alg. 2).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lalora_app.adapter.factors import FACTORS, Adapter, kind
from lalora_app.adapter.low_rank import Float64Array
from lalora_app.aggregation.average import mean_in_float64
from lalora_app.aggregation.rule import normalised_weights
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Server

# Flower's defaults of FedAdam and FedYogi.
BETA2 = 0.99  # decay β₂ of the second moment
TAU = 1e-3  # τ, added to the root of the second moment

# A tensor's step at rate 1, and the new moments that are kept: none, the first, or both.
Step = tuple[Float64Array, tuple[Float64Array, ...]]


def _adaptive(
    settings: Server, update: Float64Array, m: Float64Array, v: Float64Array, count: int
) -> Step:
    """Return Adam's or Yogi's step, with both moments corrected for their start at zero."""
    beta1, square = settings.momentum, update**2
    m = beta1 * m + (1 - beta1) * update
    away = square - v if settings.optimizer == "adam" else square * np.sign(square - v)
    v = v + (1 - BETA2) * away
    root = np.sqrt(v / (1 - BETA2**count))
    return m / (1 - beta1**count) / (root + TAU), (m, v)


def _step(
    settings: Server, update: Float64Array, m: Float64Array, v: Float64Array, count: int
) -> Step:
    """Return the step of a tensor in its aggregation number ``count``, from 1."""
    if settings.optimizer == "sgd":
        return update, ()
    if settings.optimizer == "momentum":
        m = settings.momentum * m + update
        return m, (m,)
    return _adaptive(settings, update, m, v, count)


def server_step(
    settings: Server,
    state: ServerState,
    weights: Sequence[float],
    uploads: Sequence[Adapter],
    *,
    unstepped: int = 0,
) -> tuple[ServerState, Adapter]:
    """Return the state with new moments, and the upload that replaces all uploads of the round.

    With Δ the mean upload minus the state's tensor, the upload is the tensor plus η·step, where η
    is ``server.lr``, β is ``server.momentum`` and k counts the aggregations of the tensor:

    * ``sgd``: step = Δ.
    * ``momentum``: m ← βm + Δ, step = m. A constant Δ is multiplied by up to 1/(1 − β).
    * ``adam``: m ← βm + (1 − β)Δ, v ← β₂v + (1 − β₂)Δ², step = m̂/(√v̂ + τ) with
      m̂ = m/(1 − βᵏ) and v̂ = v/(1 − β₂ᵏ). The paper starts v at τ² or more and corrects no bias.
      Moments start at zero here, with the correction of arXiv:1412.6980, so that a run of few
      rounds does not depend on a start value. The first step is Δ/(|Δ| + τ).
    * ``yogi``: as ``adam``, with v ← v − (1 − β₂)Δ²·sign(v − Δ²).

    Only tensors that travelled in the round are stepped. The moments of the others stay as they
    are, bit for bit.

    Args:
        settings: the table ``server`` of the run config.
        state: the state before the aggregation, with one adapter of the uploads' shapes.
        weights: one positive weight per client.
        uploads: one adapter per client, with equal names and shapes. Limit: for one client, Δ is
            its own update.
        unstepped: the run's first rounds in which the head travelled and no step was taken.

    Returns:
        The state before the aggregation with moments in float32, and one upload in float32; all
        sums are computed in float64.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    shares = normalised_weights(weights)
    moments = (dict(state.first_moment), dict(state.second_moment))
    stepped: Adapter = {}
    for name in uploads[0]:
        before = state.adapter[name].astype(np.float64)
        update = mean_in_float64(shares, uploads, name) - before
        m, v = (kept.get(name, np.zeros_like(before)).astype(np.float64) for kept in moments)
        count = state.aggregations(name) + 1
        count -= 0 if kind(name) in FACTORS else unstepped
        step, new = _step(settings, update, m, v, count)
        stepped[name] = (before + settings.lr * step).astype(np.float32)
        for kept, moment in zip(moments, new, strict=False):  # as many as the optimiser keeps
            kept[name] = moment.astype(np.float32)
    return replace(state, first_moment=moments[0], second_moment=moments[1]), stepped
