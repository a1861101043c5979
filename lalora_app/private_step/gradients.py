"""Types that mark on which side of the noise a gradient is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NewType

import torch
from torch import Tensor

# name -> (*shape): clipped per example, summed, noised, divided by the expected batch size.
NoisedGrads = NewType("NoisedGrads", dict[str, Tensor])


def _norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


@dataclass(frozen=True)
class StoredShape:
    """Where a tensor lies in a row: its shape, and whether it is stored transposed."""

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in memory."""
        return tuple(reversed(self.shape)) if self.transposed else self.shape

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def shaped(self, entries: Tensor) -> Tensor:
        """Return (..., size) entries as (..., *shape)."""
        stored: Tensor = torch.unflatten(entries, -1, self.stored)
        return stored.mT if self.transposed else stored


@dataclass(frozen=True)
class FlatBlock:
    """Gradients of one or more tensors, side by side: ``rows`` is (examples, entries)."""

    shapes: Mapping[str, StoredShape]
    rows: Tensor

    def _shaped(self, entries: Tensor) -> dict[str, Tensor]:
        sizes = [shape.size for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), torch.split(entries, sizes, dim=-1), strict=True)
        return {name: shape.shaped(part) for (name, shape), part in parts}

    def norms(self) -> Tensor:
        """Return (examples,): each example's norm over the block."""
        return _norms(self.rows)

    def zero_examples(self, dropped: Tensor) -> "FlatBlock":
        """Zero the examples where ``dropped`` (examples,) is true: in place, these are large."""
        self.rows.masked_fill_(dropped[:, None], 0)
        return self

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i by tensor."""
        return self._shaped(scales.to(self.rows) @ self.rows)

    def dense(self) -> dict[str, Tensor]:
        """Return the gradients by tensor, (examples, *shape)."""
        return self._shaped(self.rows)


@dataclass(frozen=True)
class StackedBlock:
    """Gradients of several tensors of one shape: ``grads`` is (tensors, examples, entries).

    One operation for all of them, and every tensor's part is contiguous.
    """

    shapes: Mapping[str, StoredShape]
    grads: Tensor

    def norms(self) -> Tensor:
        """Return (examples, tensors): each example's norm of each tensor."""
        norms: Tensor = torch.linalg.vector_norm(self.grads, dim=2)
        return norms.T

    def zero_examples(self, dropped: Tensor) -> "StackedBlock":
        """Zero the examples where ``dropped`` (examples,) is true: in place, these are large."""
        self.grads.masked_fill_(dropped[:, None], 0)
        return self

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i by tensor."""
        tensors, examples, _ = self.grads.shape
        weights = scales.to(self.grads).expand(tensors, 1, examples)
        return self._shaped(torch.bmm(weights, self.grads)[:, 0])  # (tensors, entries)

    def dense(self) -> dict[str, Tensor]:
        """Return the gradients by tensor, (examples, *shape)."""
        return self._shaped(self.grads)

    def _shaped(self, stack: Tensor) -> dict[str, Tensor]:
        parts = zip(self.shapes.items(), stack, strict=True)
        return {name: shape.shaped(entries) for (name, shape), entries in parts}


@dataclass(frozen=True)
class OuterProductBlock:
    """Gradients of a weight that sees one position an example: g_i x_iᵀ, never formed.

    ‖g_i x_iᵀ‖ = ‖g_i‖·‖x_i‖ and Σ c_i g_i x_iᵀ = (c∘g)ᵀ x: Goodfellow, arXiv:1510.01799.
    ``g`` is (examples, out), ``x`` is (examples, in).

    In float64: a factor's float32 squares may vanish where its product with the other is large.
    """

    name: str
    g: Tensor
    x: Tensor

    def norms(self) -> Tensor:
        """Return (examples,): each example's norm, in float64."""
        return _norms(self.g, torch.float64) * _norms(self.x, torch.float64)

    def zero_examples(self, dropped: Tensor) -> "OuterProductBlock":
        """Zero the examples where ``dropped`` (examples,) is true; ``x`` is the model's own."""
        g, x = (side.masked_fill(dropped[:, None], 0) for side in (self.g, self.x))
        return OuterProductBlock(self.name, g, x)

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i x_iᵀ."""
        # x at length 1, so that what is rounded in g is small beside the clip norm
        lengths = _norms(self.x, torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
        g = (scales * lengths)[:, None] * self.g
        x = self.x / lengths[:, None]
        return {self.name: g.to(self.g).T @ x.to(self.x)}

    def dense(self) -> dict[str, Tensor]:
        """Return (examples, out, in)."""
        return {self.name: self.g[:, :, None] * self.x[:, None, :]}


Block = FlatBlock | StackedBlock | OuterProductBlock


@dataclass(frozen=True)
class PerExampleGrads:
    """One gradient an example and tensor, as blocks. Sensitive: never leaves the private step."""

    blocks: tuple[Block, ...]

    def norms(self) -> Tensor:
        """Return (examples,): each example's norm over all tensors together."""
        return _norms(torch.column_stack([block.norms() for block in self.blocks]))

    def zero_examples(self, dropped: Tensor) -> "PerExampleGrads":
        """Zero the examples where ``dropped`` (examples,) is true; this one is used up."""
        return PerExampleGrads(tuple(block.zero_examples(dropped) for block in self.blocks))

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i by tensor."""
        return dict(chain.from_iterable(b.weighted_sum(scales).items() for b in self.blocks))

    def dense(self) -> dict[str, Tensor]:
        """Return (examples, *shape) by tensor; this forms what is kept as a product."""
        return dict(chain.from_iterable(block.dense().items() for block in self.blocks))
