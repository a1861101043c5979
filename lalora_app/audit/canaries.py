"""Worst-case canaries: examples whose gradients an attacker chose, for the real private step.

Canary ``i`` has a direction of its own, orthogonal to all others and spread evenly over several
tensors, and a gradient far beyond the clip norm along it. What a release holds along that
direction is the canary's own share and Gaussian noise, so one run is as many trials as canaries.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from lalora_app.private_step.gradients import FlatBlock, NoisedGrads, PerExampleGrads, StoredShape

SPREAD = 8  # tensors that each canary's gradient has an equal part in
_LOUD = 100.0  # norm of a canary's gradient before the clip, in clip norms


class CanaryBatch(NamedTuple):
    """Canaries of a micro-batch, under the name that the trainer asks a batch's size of."""

    labels: Tensor


@dataclass(frozen=True)
class Canaries:
    """Orthogonal directions in the flat vector of tensors of the given shapes.

    Attributes:
        shapes: of the tensors of one release; the first SPREAD must be of one size.
        members: (canaries,) bool, the coins: the others are empty records.
        blanks: further directions that nobody has: they show the noise alone.
        clip_norm: C of the mechanism.
    """

    shapes: Mapping[str, tuple[int, ...]]
    members: np.ndarray
    blanks: int
    clip_norm: float

    def __post_init__(self) -> None:
        """Check that there is room for every direction."""
        sizes = {slot.size for slot in list(self.slots.values())[:SPREAD]}
        if len(sizes) != 1 or len(self.members) + self.blanks > SPREAD * min(sizes):
            raise ValueError(
                f"canaries={len(self.members)} and blanks={self.blanks} must fit into "
                f"{SPREAD} tensors of one size, which have sizes {sorted(sizes)}"
            )

    @property
    def slots(self) -> dict[str, StoredShape]:
        """Where each tensor lies in the flat vector."""
        return {name: StoredShape(shape) for name, shape in self.shapes.items()}

    def gradients(self, who: Tensor) -> PerExampleGrads:
        """Return the canaries' gradients: (canary, pattern) of a block go over SPREAD entries."""
        slots = self.slots
        size = next(iter(slots.values())).size
        rows = torch.zeros(len(who), sum(slot.size for slot in slots.values()))
        patterns = torch.from_numpy(_patterns()).float()[who % SPREAD]
        places = (who // SPREAD)[:, None] + size * torch.arange(SPREAD)
        rows.scatter_(1, places, _LOUD * self.clip_norm * patterns)
        return PerExampleGrads((FlatBlock(slots, rows),))

    def projected(self, release: NoisedGrads) -> np.ndarray:
        """Return (canaries + blanks,): a release along every direction, in clip norms."""
        parts = [release[name].reshape(-1) for name in list(self.shapes)[:SPREAD]]
        # Entry j of every tensor: SPREAD numbers, which hold SPREAD directions.
        along = torch.stack(parts, dim=1).double() @ torch.from_numpy(_patterns()).T
        wanted = along.reshape(-1)[: len(self.members) + self.blanks]
        return wanted.numpy() / self.clip_norm


def _patterns() -> np.ndarray:
    """Return (patterns, tensors): orthonormal, all entries of one size."""
    patterns: np.ndarray = hadamard(SPREAD, dtype=float) / np.sqrt(SPREAD)
    return patterns


@dataclass(frozen=True)
class CanaryData:
    """The canaries as a client's dataset: those that are out are records without content."""

    canaries: Canaries

    def __len__(self) -> int:
        """Return the number of records, the empty ones included."""
        return len(self.canaries.members)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[CanaryBatch]:
        """Yield the members among the given records; an empty one adds nothing to any sum."""
        drawn = np.asarray(list(indices), dtype=int)
        inside = torch.from_numpy(drawn[self.canaries.members[drawn]])
        yield from (CanaryBatch(part) for part in torch.split(inside, size) if len(part))


class CanaryEngine:
    """Stands where a model's engine stands: hands the private step the canaries' gradients."""

    def __init__(self, canaries: Canaries):
        self._canaries = canaries
        self.parameters = {n: nn.Parameter(torch.zeros(s)) for n, s in canaries.shapes.items()}

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return the gradients of the batch that ``losses`` names."""
        return self._canaries.gradients(losses())


class CanaryBackbone:
    """All of a backbone that the private step asks for."""

    def __init__(self, canaries: Canaries):
        self.engine = CanaryEngine(canaries)

    def losses(self, batch: CanaryBatch) -> Tensor:
        """Return who is in the batch: the engine needs no losses."""
        return batch.labels
