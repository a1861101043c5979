"""What a server rule is given and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.low_rank import Float64Array
from lalora_app.settings.run_config import MethodNumbers as Numbers


@dataclass(frozen=True)
class Aggregated:
    """The next global adapter, and what moves into the base: ``W += s·B·A`` of ``fold``.

    Attributes:
        adapter: both factors, the head, and whatever else travels.
        fold: factors by PEFT's names, of any rank, in units of the global scale s; empty for all
            methods but those that move the base.
    """

    adapter: Adapter
    fold: Adapter = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundInfo:
    """What a rule may know besides the tensors: no data, and nothing of one client.

    Attributes:
        t: the round that is aggregated, from 1.
        rounds: of the whole run.
        seed: of the run.
        numbers: the run config's table ``rule``.
    """

    t: int
    rounds: int
    seed: int
    numbers: Numbers


ServerRule = Callable[[Adapter, Sequence[float], Sequence[Adapter], RoundInfo], Aggregated]


def normalised_weights(weights: Sequence[float]) -> Float64Array:
    """Return p_k: the weights over their sum."""
    shares: Float64Array = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return shares
