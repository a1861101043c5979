"""The type of a federated LoRA method: a value made of plain functions.

No module of this folder imports torch before a function computes: a client looks a method up in
messages that it answers without a model, and torch takes two seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lalora_app.adapter.factors import Adapter, Factor, Factors
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.rule import ServerRule as ServerRule
from lalora_app.methods import alignment, optimizers, schedule
from lalora_app.methods.filters import identity, no_penalty
from lalora_app.methods.schedule import SyncSchedule, TrainSchedule
from lalora_app.settings.run_config import MethodNumbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lalora_app.methods.weight_noise import Perturbation
    from lalora_app.private_step.gradients import NoisedGrads


def _unchanged(start: Adapter, rule: MethodNumbers) -> Adapter:
    return start


def _own_rank(rank: int, rule: MethodNumbers) -> int:
    return rank


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated-LoRA method: plain functions, looked up by name on both sides of the wire.

    Attributes:
        paper: the source of the method.
        trains: (round t, step k) -> the factors that take this local step; none: only the head.
        syncs: round t -> the factors that clients upload and the server aggregates.
        finally_syncs: the factors that clients also upload in the last round.
        start: initial adapter -> the adapter before the first round, computed without data.
        width: rank of the run -> rank of the model.
        effective: all trained tensors -> the model's own factors and head; None: they are equal.
        calibrates: whether the server sets masks and base from public inputs before round 1.
        perturb: the perturbation of the frozen weights during a gradient, drawn without the batch.
        postprocess: noised gradients -> gradients for the optimiser.
        penalty: (gradients for the optimiser, present tensors) -> the same with the gradient of a
            penalty on the tensors, which reads no example.
        optimizer: the optimiser of the local steps.
        report: the optimiser after the steps -> tensors that travel with the factors.
        align: (adapter at the start, adapter after the steps) -> the client's result.
        aggregate: (global adapter, weights, uploads, round) -> new global adapter and the product
            that is added to the base weights.
        next_rank: (adapter that a client received, its upload) -> the client's rank from now on;
            None: it never changes.
        exact: whether the new product equals the mean of the clients' products.
        linear: whether the server needs only the sum of the uploads, so that secure aggregation
            and a robust mean are possible.
        moves_base: whether part of the learnt product moves into the frozen weights.
        heterogeneous: whether clients' ranks may differ.
        whole: whether the whole weights of the target layers train, in place of A and B.
        keeps_client_state: whether a client's result depends on factors that it saved before.
    """

    paper: str
    trains: TrainSchedule
    syncs: SyncSchedule
    finally_syncs: Factors = frozenset()
    start: Callable[[Adapter, MethodNumbers], Adapter] = _unchanged
    width: Callable[[int, MethodNumbers], int] = _own_rank
    effective: Callable[[dict[str, Tensor], MethodNumbers], dict[str, Tensor]] | None = None
    calibrates: bool = False
    perturb: Perturbation | None = None
    postprocess: Callable[[NoisedGrads], NoisedGrads] = identity
    penalty: Callable[[NoisedGrads, Mapping[str, Tensor], MethodNumbers], NoisedGrads] = no_penalty
    optimizer: optimizers.OptimizerFactory = optimizers.configured_optimizer
    report: Callable[[torch.optim.Optimizer], Adapter] = optimizers.no_report
    align: Callable[[Adapter, Adapter], Adapter] = alignment.keep_result
    aggregate: ServerRule = federated_averaging
    next_rank: Callable[[Adapter, Adapter, MethodNumbers], int] | None = None
    exact: bool = False
    linear: bool = True
    moves_base: bool = False
    heterogeneous: bool = False
    whole: bool = False
    keeps_client_state: bool = False

    @property
    def averages_tensors(self) -> bool:
        """Whether the server's rule is the mean of the tensors alone.

        The factors then keep their coordinates from round to round.
        """
        return self.aggregate is federated_averaging

    def sent(self, t: int, *, last: bool) -> Factors:
        """Return the factors that travel up in round ``t``."""
        synced = self.syncs(t)
        return synced | self.finally_syncs if last and synced else synced

    @property
    def head_only(self) -> bool:
        """Whether no factor ever trains, so that the product B·A stays zero.

        Limit: only of an entry of the table. Rounds of the head alone before the first round hide
        what trains later.
        """
        rounds = (self.trains(t, k) for t in (1, 2) for k in range(schedule.PERIOD))
        return not frozenset().union(*rounds)

    def resident(self, t: int, local_steps: int) -> frozenset[Factor]:
        """Return the factors that round ``t`` trains without sending them."""
        return schedule.factors_trained_in(self.trains, t, local_steps) - self.syncs(t)
