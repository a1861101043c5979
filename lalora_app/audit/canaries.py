"""Worst-case canaries: examples with gradients of the attacker's choice, for the real private step.

Canary ``i`` has a direction of its own. It is orthogonal to all others and spread evenly over
several tensors, and the canary's gradient along it is far longer than the clip norm and than the
constant that automatic clipping adds to a norm: either clipping brings it to about C. A release
along that direction is the canary's clipped gradient, if it was drawn, and Gaussian noise. So one
run is as many trials as there are canaries (Steinke et al., arXiv:2305.08846).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from lalora_app.private_step.gradients import FlatBlock, NoisedGrads, PerExampleGrads, StoredShape
from lalora_app.private_step.mechanism import AUTOMATIC_SHIFT

SPREAD = 8  # number of tensors over which a canary's gradient is spread
_NORM = 100.0  # norm of a canary's gradient before the clip, in the larger of C and γ


class CanaryBatch(NamedTuple):
    """A micro-batch of canaries; their indices stand in the place of the labels."""

    labels: Tensor


@dataclass(frozen=True)
class Canaries:
    """Orthogonal directions in the flat vector of tensors of the given shapes.

    Attributes:
        shapes: shapes of the tensors of one release by name; the first SPREAD have one size.
        members: (canaries,) bool, whether each canary is in the data; others are empty records.
        blanks: number of further directions without a canary, which show the noise alone.
        clip_norm: C of the mechanism.

    Raises:
        ValueError: if the first SPREAD tensors differ in size or have too few entries.
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
        """The place of each tensor in the flat vector."""
        return {name: StoredShape(shape) for name, shape in self.shapes.items()}

    def gradients(self, indices: Tensor) -> PerExampleGrads:
        """Return the gradients of the canaries ``indices`` (batch,), as one block."""
        return PerExampleGrads((self.block(indices),))

    def block(self, indices: Tensor) -> FlatBlock:
        """Return the gradients of the canaries ``indices`` (batch,), as rows.

        Canary i has the entry i // SPREAD of each of the first SPREAD tensors, with the signs of
        pattern i % SPREAD.
        """
        slots = self.slots
        size = next(iter(slots.values())).size
        rows = torch.zeros(len(indices), sum(slot.size for slot in slots.values()))
        patterns = torch.from_numpy(_patterns()).float()[indices % SPREAD]
        places = (indices // SPREAD)[:, None] + size * torch.arange(SPREAD)
        rows.scatter_(1, places, _NORM * max(self.clip_norm, AUTOMATIC_SHIFT) * patterns)
        return FlatBlock(slots, rows)

    def projected(self, release: NoisedGrads) -> np.ndarray:
        """Return (canaries + blanks,): a release along every direction, in clip norms."""
        parts = [release[name].reshape(-1) for name in list(self.shapes)[:SPREAD]]
        # Entry j of every tensor: SPREAD numbers, which hold SPREAD directions.
        along = torch.stack(parts, dim=1).double() @ torch.from_numpy(_patterns()).T
        projections = along.reshape(-1)[: len(self.members) + self.blanks]
        return projections.numpy() / self.clip_norm


def _patterns() -> np.ndarray:
    """Return (patterns, tensors): orthonormal rows, with entries of one size."""
    patterns: np.ndarray = hadamard(SPREAD, dtype=float) / np.sqrt(SPREAD)
    return patterns


@dataclass(frozen=True)
class CanaryData:
    """The canaries as a client's dataset, in which absent canaries are empty records.

    Attributes:
        canaries: the canaries and their membership.
    """

    canaries: Canaries

    def __len__(self) -> int:
        """Return the number of records, the empty ones included."""
        return len(self.canaries.members)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[CanaryBatch]:
        """Yield the members among the given records; an empty record adds nothing to a sum."""
        drawn = np.asarray(list(indices), dtype=int)
        inside = torch.from_numpy(drawn[self.canaries.members[drawn]])
        yield from (CanaryBatch(part) for part in torch.split(inside, size) if len(part))


class CanaryEngine:
    """Gives the private step the canaries' gradients in the place of a model's."""

    def __init__(self, canaries: Canaries):
        self._canaries = canaries
        self.parameters = {n: nn.Parameter(torch.zeros(s)) for n, s in canaries.shapes.items()}

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return the gradients of the canaries whose indices ``losses`` returns."""
        return self._canaries.gradients(losses())


class CanaryBackbone:
    """Gives the private step canaries in the place of a model."""

    def __init__(self, canaries: Canaries):
        self.engine = CanaryEngine(canaries)

    def losses(self, batch: CanaryBatch) -> Tensor:
        """Return the indices of the batch's canaries: their gradients need no losses."""
        return batch.labels
