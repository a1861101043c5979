"""Types of gradients: per-example gradients (sensitive) and noised gradients (releasable).

`PerExampleGrads` holds the gradients of a batch as blocks. A block stores the tensors of one memory
layout and computes norms and weighted sums over examples without copying.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import NewType

import torch
from torch import Tensor

# Tensor name -> mean gradient: clipped per example, summed, noised, divided by q·n.
NoisedGrads = NewType("NoisedGrads", dict[str, Tensor])

_TINY = torch.finfo(torch.float64).tiny
# Most entries of a temporary float64 tensor, if one example does not need more; more on a GPU.
_TEMPORARY, _ON_GPU = 2**18, 2**24
_ROUNDING = 16  # rounding units of a sum over rows, a constant: no example has effect on another's


def _norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
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
        lengths = _norms(self.x, torch.float64).clamp(min=_TINY)
        g = (scales * lengths)[:, None] * self.g
        x = self.x / lengths[:, None]
        return {self.name: g.to(self.g).T @ x.to(self.x)}

    def dense(self) -> dict[str, Tensor]:
        """Return the outer products, (examples, out, in)."""
        return {self.name: self.g[:, :, None] * self.x[:, None, :]}


def _norms_by_gram(g: Tensor, x: Tensor) -> Tensor:
    """Return (examples,): ‖Σ_t g_t x_tᵀ‖ as the root of Σ_{t,t'} (g_t·g_t')(x_t·x_t')."""
    squared = torch.linalg.vecdot((g @ g.mT).flatten(1), (x @ x.mT).flatten(1))
    root: Tensor = squared.clamp(min=0).sqrt()  # rounding may make a square of 0 negative
    return root


def _norms_by_product(g: Tensor, x: Tensor) -> Tensor:
    """Return (examples,): ‖Σ_t g_t x_tᵀ‖ of the matrices themselves."""
    return _norms((g.mT @ x).flatten(1))


@dataclass(frozen=True)
class RowsBlock:
    """Gradients G_i = Σ_t g_t x_tᵀ of a whole weight, kept as the rows g and x of each example.

    No (examples, out, in) tensor is formed. ‖G_i‖² = Σ_{t,t'} (g_t·g_t')(x_t·x_t') needs two Gram
    matrices (Li et al., arXiv:2110.05679, section 4); for many rows, G_i is formed for a few
    examples at a time. Both are computed in float64.

    Where the terms of G_i nearly cancel, rounding of the weighted sum is relative to Σ_t ‖g_t‖‖x_t‖
    and not to ‖G_i‖. A constant number of rounding units of it is added to the norm, which is then
    an upper bound, also of a square that rounding made negative.

    Attributes:
        name: the tensor's name.
        g: (examples, rows, out), gradients of the layer's output.
        x: (examples, rows, in), inputs of the layer.
        dropped: (examples,), true where the gradient counts as zero; None: nowhere.
    """

    name: str
    g: Tensor
    x: Tensor
    dropped: Tensor | None = None

    def _parts(self, entries: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (examples, g, x) of parts of the batch, whose examples need ``entries`` each."""
        limit = _TEMPORARY if self.g.device.type == "cpu" else _ON_GPU
        step = max(1, limit // max(1, entries))
        for first in range(0, len(self.g), step):
            part = slice(first, first + step)
            g, x = self.g[part], self.x[part]
            if self.dropped is not None:
                mask = self.dropped[part, None, None]
                g, x = g.masked_fill(mask, 0), x.masked_fill(mask, 0)
            yield part, g, x

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.g.dtype, torch.float32)

    def norms(self) -> Tensor:
        """Return (examples,): the norm of every example in float64, an upper bound."""
        rows, (out, inner) = self.g.shape[1], (self.g.shape[2], self.x.shape[2])
        by_gram = rows * (out + inner) <= out * inner
        formed, found = (2 * rows**2 if by_gram else out * inner), []
        for _, narrow_g, narrow_x in self._parts(formed + rows * (out + inner)):
            g, x = narrow_g.double(), narrow_x.double()
            lengths = torch.linalg.vecdot(_norms(g), _norms(x))
            norms = _norms_by_gram(g, x) if by_gram else _norms_by_product(g, x)
            found.append(norms + _ROUNDING * torch.finfo(self._sum_dtype).eps * lengths)
        return torch.cat(found)

    def zero_examples(self, dropped: Tensor) -> "RowsBlock":
        """Return a block with zeros where ``dropped`` (examples,) is true; x stays as it is."""
        return replace(self, dropped=dropped)

    def weighted_sum(self, scales: Tensor) -> dict[str, Tensor]:
        """Return Σ_i scales_i · G_i, one product over the rows of many examples."""
        out, inner = self.g.shape[2], self.x.shape[2]
        total = self.g.new_zeros((out, inner), dtype=self._sum_dtype)
        for part, g, x in self._parts(self.g.shape[1] * (out + inner)):
            # rows of x are scaled to length 1, as in OuterProductBlock
            lengths = _norms(x, torch.float64).clamp(min=_TINY)[..., None]
            left = (scales[part, None, None] * lengths * g).to(total)
            total.addmm_(left.flatten(0, 1).T, (x / lengths).to(total).flatten(0, 1))
        return {self.name: total}

    def dense(self) -> dict[str, Tensor]:
        """Return the gradients, (examples, out, in)."""
        ((_, g, x),) = self._parts(0)
        return {self.name: g.to(self._sum_dtype).mT @ x.to(self._sum_dtype)}


Block = FlatBlock | StackedBlock | OuterProductBlock | RowsBlock


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
