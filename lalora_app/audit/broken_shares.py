"""Forms of shared noise with one known defect each: an audit of the sum must call them broken.

They exist for the audit and its tests only: no method and no config key reaches them. Each defect
has the number of clients that makes its effect large. All examples are in every batch (q = 1), and
there is one round: little to compute, and no sampling that hides a defect.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lalora_app.audit.canaries import Canaries, CanaryBatch
from lalora_app.audit.shared_step import SharedSum, tensors_of, victims_part
from lalora_app.audit.step_attack import StepInputs
from lalora_app.privacy.counted_releases import CountedReleases
from lalora_app.private_step.gradients import FlatBlock, NoisedGrads, PerExampleGrads
from lalora_app.private_step.step import GradientSource
from lalora_app.shared_noise.shares import Cohort

LOCAL_STEPS = 2
_OWN_NOISE = 0.25  # deviation of one share, in clip norms, in the two steps of one upload
_WITNESSES = 4.0  # records per canary that tell where the client's own model is, over z


class AllCounted(Cohort):
    """Clients that divide the noise by n: the attacker's own share and c more are counted too."""

    @property
    def honest_if_all_upload(self) -> int:
        """Return n in place of n - 1 - c."""
        return self.clients


class SquaredVariance(Cohort):
    """Clients with the variance σ²/N² in place of σ²/N: the deviation was divided by N, not √N."""

    def share_fraction(self, missing: int) -> Fraction:
        """Return the square of the right fraction."""
        return super().share_fraction(missing) ** 2


class SquaredDeviation(Cohort):
    """Clients with the deviation σ/N² in place of σ/√N."""

    def share_fraction(self, missing: int) -> Fraction:
        """Return the fourth power of the right fraction."""
        return super().share_fraction(missing) ** 4


class _Witnesses:
    """A victim's second step at its own model, in which other records tell of the first step.

    Each canary has witnesses, which are in the data on both sides. The gradient of a witness is
    zero at the model that all clients share. Elsewhere it is along its canary's direction, up or
    down by the side of the own model: a step across where the canary alone would move it half.

    Args:
        canaries: the canaries, which are in the second batch again.
        engine: the tensors that the step trains.
        each: number of witnesses per canary.
        position: (canaries,), the first step along every direction, in clip norms.
    """

    def __init__(self, canaries: Canaries, engine: GradientSource, each: int, position: np.ndarray):
        self.parameters, self._canaries, self._each = engine.parameters, canaries, each
        self._sides = torch.from_numpy(np.where(position > 0.5, 1.0, -1.0)).float()

    def __len__(self) -> int:
        """Return the number of records: the canaries, then their witnesses."""
        return len(self._sides) * (1 + self._each)

    @property
    def engine(self) -> GradientSource:
        """Return this object: it is the source of the gradients too."""
        return self

    def micro_batches(self, indices: np.ndarray, size: int) -> Iterable[CanaryBatch]:
        """Yield the witnesses and the present canaries among the records ``indices``."""
        drawn = np.asarray(indices, dtype=int)
        canaries = len(self._sides)
        there = (drawn >= canaries) | self._canaries.members[drawn % canaries]
        yield from (CanaryBatch(p) for p in torch.split(torch.from_numpy(drawn[there]), size))

    def losses(self, batch: CanaryBatch) -> Tensor:
        """Return the indices of the records: their gradients need no losses."""
        return batch.labels

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return the gradients of the records whose indices ``losses`` returns."""
        records, canaries = losses(), len(self._sides)
        own = records % canaries
        block = self._canaries.block(own)
        signs = torch.where(records < canaries, torch.ones(()), self._sides[own])
        return PerExampleGrads((FlatBlock(block.shapes, signs[:, None] * block.rows),))


class TwoLocalSteps(SharedSum):
    """Two local steps under one sum: the second is at the client's own model.

    Only the client's own share protects its own model, and the second step tells of it: the sum
    then shows the first step of one client with the noise of one share.
    """

    def __call__(self, inputs: StepInputs) -> NoisedGrads:
        """Return the sum of both steps of the round, as the attacker has it."""
        lattice, shares = self.lattice(inputs), [self.seeds(inputs) for _ in range(LOCAL_STEPS)]
        first = victims_part(inputs, lattice, shares[0][0])
        own_step = tensors_of(first * lattice.unit, inputs.model.engine.parameters)
        each = math.ceil(_WITNESSES * lattice.constants.noise_multiplier)
        position = inputs.canaries.projected(own_step)[: len(inputs.canaries.members)]
        moved = _Witnesses(inputs.canaries, inputs.model.engine, each, position)
        second = victims_part(replace(inputs, model=moved, data=moved), lattice, shares[1][0])
        parts = [
            self.seen(inputs, lattice, own, upload)
            for own, upload in zip(shares, (first, second), strict=True)
        ]
        return NoisedGrads({name: parts[0][name] + parts[1][name] for name in parts[0]})


def two_steps(run: CountedReleases) -> TwoLocalSteps:
    """Return two local steps in a run with so many clients that one share is a quarter of C."""
    noise = run.release.noise_multiplier
    clients = 1 + math.ceil((noise / _OWN_NOISE) ** 2)
    return TwoLocalSteps(run, Cohort(clients, clients))


@dataclass(frozen=True)
class BrokenSharing:
    """A form of shared noise with a known defect.

    Attributes:
        defect: the defect in a few words.
        make: (releases of the run) -> the round, as an attacker sees it.
        steps: local steps of a round, each a counted release.
    """

    defect: str
    make: Callable[[CountedReleases], SharedSum]
    steps: int = 1


BROKEN_SHARING = {
    "two-local-steps": BrokenSharing(
        "takes a second local step at the client's own model, which one share alone protects",
        two_steps,
        steps=LOCAL_STEPS,
    ),
    "all-shares-counted": BrokenSharing(
        "counts on the shares of all 16 clients, of which the attacker knows 15",
        lambda run: SharedSum(run, AllCounted(16, 16, colluding=14)),
    ),
    "squared-variance": BrokenSharing(
        "draws shares with the variance σ²/N² in place of σ²/N, with 20 clients",
        lambda run: SharedSum(run, SquaredVariance.of(20)),
    ),
    "squared-deviation": BrokenSharing(
        "draws shares with the deviation σ/N² in place of σ/√N, with 20 clients",
        lambda run: SharedSum(run, SquaredDeviation.of(20)),
    ),
    "revealed-twice": BrokenSharing(
        "reveals the seeds for 0 and for 36 missing of 40 clients, with a threshold of 4",
        lambda run: SharedSum(run, Cohort(40, 4), missing=36, answered=0),
    ),
}
