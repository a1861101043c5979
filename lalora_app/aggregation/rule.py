"""The type of a server rule, its input and its result.

A server rule is a function (current adapter, weights, uploads, round) -> `Aggregated`. Write a new
one into a module of its own in this folder, with the arguments of `average.federated_averaging`,
and set it as ``aggregate`` of a method in ``methods/table.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.low_rank import Float64Array
from lalora_app.settings.run_config import MethodNumbers as Numbers


@dataclass(frozen=True)
class Aggregated:
    """The next global adapter, and a product to add to the base: ``W += s·B·A`` of ``fold``.

    Attributes:
        adapter: the complete new adapter: both factors, the head and the method's extra tensors.
        fold: factors by PEFT's names, of any rank, to be multiplied by the run's LoRA scale s;
            empty if the method does not change the base weights.
        memory: tensors that only the server keeps, for the rule's next round.
    """

    adapter: Adapter
    fold: Adapter = field(default_factory=dict)
    memory: Adapter = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundInfo:
    """The round and the settings that a rule may read; nothing depends on data or one client alone.

    Attributes:
        t: number of the round that is aggregated, from 1.
        rounds: number of rounds of the whole run.
        seed: random seed of the run.
        numbers: the table ``rule`` of the run config.
        memory: what the rule's last round has left in ``Aggregated.memory``.
    """

    t: int
    rounds: int
    seed: int
    numbers: Numbers
    memory: Adapter = field(default_factory=dict)


ServerRule = Callable[[Adapter, Sequence[float], Sequence[Adapter], RoundInfo], Aggregated]


def normalised_weights(weights: Sequence[float]) -> Float64Array:
    """Return p_k (clients,): the weights divided by their sum."""
    shares: Float64Array = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return shares
