"""What one backward pass recorded, turned into one gradient an example and tensor."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lalora_app.adapter.factors import kind
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.gradients import (
    Block,
    FlatBlock,
    OuterProductBlock,
    PerExampleGrads,
    StackedBlock,
    StoredShape,
)


def stored_shape_of(shape: tuple[int, ...], *, flat: bool) -> StoredShape:
    """Lay a tensor out so that the batched product writes rows of its longer side.

    It then reads the wide operand along memory; on a CPU the other order is several times slower.
    """
    tall = len(shape) == 2 and shape[0] > shape[1]
    return StoredShape(shape, transposed=tall and not flat)


def unused_parameter_error(name: str) -> LayoutError:
    """Return the error of an active tensor without a gradient."""
    return LayoutError(f"{name} is active but took no part in the forward pass")


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float, first: bool) -> None:
    """Add ``scale · leftᵀ right`` an example: (examples, rows, i), (examples, rows, j)."""
    both_narrow = left.dtype == right.dtype != into.dtype
    if both_narrow and left.device.type != "cpu":  # a GPU sums bf16 products in fp32 by itself
        product = torch.bmm(left.mT, right, out_dtype=into.dtype).mul_(scale)
        into.copy_(product) if first else into.add_(product)
    else:
        wide = (left.to(into.dtype).mT, right.to(into.dtype))
        into.baddbmm_(*wide, beta=0.0 if first else 1.0, alpha=scale)


GroupKey = tuple[int, ...]


class BufferLayout:
    """How the gradients of the active tensors share memory; the same in every pass of a phase.

    Args:
        slots: the active tensors.
        flat: keep the factors in one (examples, entries) buffer, and not in one a shape.
    """

    def __init__(self, slots: Mapping[str, StoredShape], flat: bool):
        self.slots, self.flat = dict(slots), flat
        self.heads = [name for name in slots if kind(name) == "head"]
        self.groups: dict[GroupKey, dict[str, StoredShape]] = {}  # factors that share a buffer
        for name, slot in slots.items():
            if kind(name) != "head":
                self.groups.setdefault(() if flat else slot.stored, {})[name] = slot
        self.group_of = {name: key for key, names in self.groups.items() for name in names}

    def shared(
        self, key: GroupKey, examples: int, like: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a group's unwritten buffer, and (examples, *stored) views of it by name."""
        slots, dtype = self.groups[key], torch.promote_types(like.dtype, torch.float32)
        if not self.flat:
            buffer = like.new_empty((len(slots), examples, math.prod(key)), dtype=dtype)
            views = torch.unflatten(buffer, 2, key).unbind()
            return buffer, dict(zip(slots, views, strict=True))
        sizes = [slot.size for slot in slots.values()]
        buffer = like.new_empty((examples, sum(sizes)), dtype=dtype)
        parts = zip(slots.items(), torch.split(buffer, sizes, dim=1), strict=True)
        return buffer, {name: torch.unflatten(part, 1, s.stored) for (name, s), part in parts}


class GradientTape:
    """The gradients of one batch while its backward runs.

    Args:
        examples: the batch size; every layer's rows are grouped by example, in this order.
        layout: of the active tensors.
    """

    def __init__(self, examples: int, layout: BufferLayout):
        self._examples, self._layout = examples, layout
        self._buffers: dict[GroupKey, Tensor] = {}
        self._views: dict[str, Tensor] = {}  # name -> (examples, *stored)
        self._written: set[str] = set()
        self._products: dict[str, list[tuple[Tensor, Tensor]]] = {}  # name -> (g, x) of a call

    def _by_example(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows % self._examples:
            raise LayoutError(f"{rows} rows do not divide into {self._examples} examples")
        return x.reshape(self._examples, -1, x.shape[-1])

    def record(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        """Take ``scale · Σ_rows g xᵀ`` an example, or of a bias ``Σ_rows g`` (kernels.Recorder).

        Sums run in fp32 at least, also of bf16 operands. A layer's calls add up.
        """
        g = self._by_example(g)  # (examples, rows, out)
        if x is None:
            self._add_bias(name, g)
            return
        x = self._by_example(x)  # (examples, rows, in)
        if g.shape[1] == 1 and name in self._layout.heads:
            wide = torch.promote_types(g.dtype, torch.float32)
            sides = (g.detach().to(wide), x.detach().to(wide))  # x may hold on to its graph
            self._products.setdefault(name, []).append(sides)
        else:
            self._add(name, g, x, scale)

    def _add_bias(self, name: str, g: Tensor) -> None:
        total = g.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
        self._views[name] = self._views[name] + total if name in self._written else total
        self._written.add(name)

    def _add(self, name: str, g: Tensor, x: Tensor, scale: float) -> None:
        slot, first = self._layout.slots[name], name not in self._written
        if name not in self._views:
            self._allocate(name, g)
        left, right = (x, g) if slot.transposed else (g, x)
        _add_product(self._views[name], left, right, scale, first)
        self._written.add(name)

    def _allocate(self, name: str, like: Tensor) -> None:
        if name in self._layout.heads:
            shape = (self._examples, *self._layout.slots[name].stored)
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._views[name] = like.new_empty(shape, dtype=dtype)
            return
        key = self._layout.group_of[name]
        self._buffers[key], views = self._layout.shared(key, self._examples, like)
        self._views |= views

    def _head_block(self, name: str) -> Block:
        pairs = self._products.get(name, [])
        if len(pairs) == 1 and name not in self._written:
            return OuterProductBlock(name, *(side[:, 0] for side in pairs[0]))
        for g, x in pairs:  # called several times: the sum of products has to be formed
            self._add(name, g, x, 1.0)
        return FlatBlock({name: self._layout.slots[name]}, self._views[name].flatten(1))

    def grads(self) -> PerExampleGrads:
        """Return what was recorded.

        Raises:
            LayoutError: if an active tensor took no part.
        """
        for name in self._layout.slots:
            if name not in self._written and name not in self._products:
                raise unused_parameter_error(name)
        block = FlatBlock if self._layout.flat else StackedBlock
        factors = [block(slots, self._buffers[k]) for k, slots in self._layout.groups.items()]
        return PerExampleGrads((*factors, *map(self._head_block, self._layout.heads)))
