"""Types of gradients: per-example gradients (sensitive) and noised gradients (releasable).

`PerExampleGrads` holds the gradients of a batch as blocks. A block stores the tensors of one memory
layout and computes norms and weighted sums over examples without copying.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NewType

import torch
from torch import Tensor

# Tensor name -> mean gradient: clipped per example, summed, noised, divided by q·n.
NoisedGrads = NewType("NoisedGrads", dict[str, Tensor])


def _norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


@dataclass(frozen=True)
class StoredShape:
    """The shape of a tensor and its memory order.

    Attributes:
        shape: shape of the model's tensor.
        transposed: whether the gradient is stored transposed, for a faster matrix product.
    """

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """Return the shape in memory."""
        return tuple(reversed(self.shape)) if self.transposed else self.shape

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    def shaped(self, entries: Tensor) -> Tensor:
        """Return (..., size) entries as (..., *shape)."""
        stored: Tensor = torch.unflatten(entries, -1, self.stored)
        return stored.mT if self.transposed else stored


@dataclass(frozen=True)
class FlatBlock:
    """Gradients of one or more tensors in one matrix, one row per example.

    Attributes:
        shapes: the tensors of the block in the order of the columns.
        rows: (examples, entries), all tensors of an example side by side.
    """

    shapes: Mapping[str, StoredShape]
    rows: Tensor

    def _shaped(self, entries: Tensor) -> dict[str, Tensor]:
        sizes = [shape.size for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), torch.split(entries, sizes, dim=-1), strict=True)
        return {name: shape.shaped(part) for (name, shape), part in parts}

    def norms(self) -> Tensor:
        """Return (examples,): the norm of every example over the tensors of the block."""
        return _norms(self.rows)

    def zero_examples(self, dropped: Tensor) -> "FlatBlock":
        """Overwrite with zeros where ``dropped`` (examples,) is true; in place to save memory."""
        self.rows.masked_fill_(dropped[:, None], 0)
        return self

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i per tensor, over examples i."""
        return self._shaped(scales.to(self.rows) @ self.rows)

    def dense(self) -> dict[str, Tensor]:
        """Return the gradients per tensor, (examples, *shape)."""
        return self._shaped(self.rows)


@dataclass(frozen=True)
class StackedBlock:
    """Gradients of several tensors of equal shape, so that one operation serves all of them.

    Attributes:
        shapes: the tensors of the block in order.
        grads: (tensors, examples, entries); the part of every tensor is contiguous.
    """

    shapes: Mapping[str, StoredShape]
    grads: Tensor

    def norms(self) -> Tensor:
        """Return (examples, tensors): the norm of every example, per tensor."""
        norms: Tensor = torch.linalg.vector_norm(self.grads, dim=2)
        return norms.T

    def zero_examples(self, dropped: Tensor) -> "StackedBlock":
        """Overwrite with zeros where ``dropped`` (examples,) is true; in place to save memory."""
        self.grads.masked_fill_(dropped[:, None], 0)
        return self

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i per tensor, over examples i."""
        tensors, examples, _ = self.grads.shape
        weights = scales.to(self.grads).expand(tensors, 1, examples)
        return self._shaped(torch.bmm(weights, self.grads)[:, 0])  # (tensors, entries)

    def dense(self) -> dict[str, Tensor]:
        """Return the gradients per tensor, (examples, *shape)."""
        return self._shaped(self.grads)

    def _shaped(self, stack: Tensor) -> dict[str, Tensor]:
        parts = zip(self.shapes.items(), stack, strict=True)
        return {name: shape.shaped(entries) for (name, shape), entries in parts}


@dataclass(frozen=True)
class OuterProductBlock:
    """Gradients g_i x_iᵀ of a weight that is applied once per example, kept as g and x.

    ‖g_i x_iᵀ‖ = ‖g_i‖·‖x_i‖ and Σ c_i g_i x_iᵀ = (c∘g)ᵀ x (Goodfellow, arXiv:1510.01799), so the
    outer products are never formed. Norms are computed in float64: the float32 squares of a small
    g_i can underflow although ‖g_i‖·‖x_i‖ is large.

    Attributes:
        name: the tensor's name.
        g: (examples, out), gradients of the layer's output.
        x: (examples, in), inputs of the layer.
    """

    name: str
    g: Tensor
    x: Tensor

    def norms(self) -> Tensor:
        """Return (examples,): the norm of every example, in float64."""
        return _norms(self.g, torch.float64) * _norms(self.x, torch.float64)

    def zero_examples(self, dropped: Tensor) -> "OuterProductBlock":
        """Return a copy with zeros where ``dropped`` (examples,) is true; the model may share x."""
        g, x = (side.masked_fill(dropped[:, None], 0) for side in (self.g, self.x))
        return OuterProductBlock(self.name, g, x)

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i x_iᵀ."""
        # x is scaled to length 1, so that g has at most the clipping norm and its rounding errors
        # are small compared with the clipping norm
        lengths = _norms(self.x, torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
        g = (scales * lengths)[:, None] * self.g
        x = self.x / lengths[:, None]
        return {self.name: g.to(self.g).T @ x.to(self.x)}

    def dense(self) -> dict[str, Tensor]:
        """Return the outer products, (examples, out, in)."""
        return {self.name: self.g[:, :, None] * self.x[:, None, :]}


Block = FlatBlock | StackedBlock | OuterProductBlock


@dataclass(frozen=True)
class PerExampleGrads:
    """One gradient per example and tensor, stored as blocks.

    Privacy: sensitive, neither clipped nor noised; must not leave the private step.
    """

    blocks: tuple[Block, ...]

    def norms(self) -> Tensor:
        """Return (examples,): the norm of every example over all tensors together."""
        return _norms(torch.column_stack([block.norms() for block in self.blocks]))

    def zero_examples(self, dropped: Tensor) -> "PerExampleGrads":
        """Return gradients with zeros where ``dropped`` (examples,) is true; may overwrite self."""
        return PerExampleGrads(tuple(block.zero_examples(dropped) for block in self.blocks))

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · g_i per tensor, over examples i."""
        return dict(chain.from_iterable(b.weighted_sum(scales).items() for b in self.blocks))

    def dense(self) -> dict[str, Tensor]:
        """Return (examples, *shape) per tensor, with all outer products formed."""
        return dict(chain.from_iterable(block.dense().items() for block in self.blocks))
