"""What one backward pass recorded, turned into one gradient an example and tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lalora_app.adapter import kind
from lalora_app.privacy.attach import LayoutError
from lalora_app.privacy.types import Block, Outer, PerExampleGrads, Rows, Slot, Stack


def slot_of(shape: tuple[int, ...], *, flat: bool) -> Slot:
    """Lay a tensor out so that the batched product writes rows of its longer side.

    It then reads the wide operand along memory; on a CPU the other order is several times slower.
    """
    tall = len(shape) == 2 and shape[0] > shape[1]
    return Slot(shape, transposed=tall and not flat)


def unused(name: str) -> LayoutError:
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


class Tape:
    """The gradients of one batch while its backward runs.

    Args:
        examples: the batch size; every layer's rows are grouped by example, in this order.
        slots: the active tensors.
        flat: keep the factors in one (examples, entries) buffer, and not in one a shape.
    """

    def __init__(self, examples: int, slots: Mapping[str, Slot], flat: bool):
        self._examples, self._slots, self._flat = examples, slots, flat
        self._groups: dict[tuple[int, ...], list[str]] = {}  # factors that share a buffer
        for name, slot in slots.items():
            if kind(name) != "head":
                self._groups.setdefault(() if flat else slot.stored, []).append(name)
        self._buffers: dict[tuple[int, ...], Tensor] = {}
        self._rows: dict[str, Tensor] = {}  # name -> (examples, entries)
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
        wide = torch.promote_types(g.dtype, torch.float32)
        if x is None:
            total = g.sum(1, dtype=wide)
            self._rows[name] = self._rows[name] + total if name in self._rows else total
            return
        x = self._by_example(x)  # (examples, rows, in)
        if kind(name) == "head" and g.shape[1] == 1:
            sides = (g.detach().to(wide), x.detach().to(wide))  # x may hold on to its graph
            self._products.setdefault(name, []).append(sides)
        else:
            self._add(name, g, x, scale)

    def _add(self, name: str, g: Tensor, x: Tensor, scale: float) -> None:
        slot, first = self._slots[name], name not in self._rows
        if first:
            self._rows[name] = self._new_rows(name, g)
        left, right = (x, g) if slot.transposed else (g, x)
        _add_product(torch.unflatten(self._rows[name], 1, slot.stored), left, right, scale, first)

    def _new_rows(self, name: str, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        slot = self._slots[name]
        if kind(name) == "head":
            return like.new_empty((self._examples, slot.size), dtype=dtype)
        key = () if self._flat else slot.stored
        names = self._groups[key]
        sizes = [self._slots[other].size for other in names]
        if key not in self._buffers:
            flat, stacked = (self._examples, sum(sizes)), (len(names), self._examples, slot.size)
            self._buffers[key] = like.new_empty(flat if self._flat else stacked, dtype=dtype)
        buffer, index = self._buffers[key], names.index(name)
        return torch.split(buffer, sizes, dim=1)[index] if self._flat else buffer[index]

    def _factor_block(self, key: tuple[int, ...]) -> Block:
        slots = {name: self._slots[name] for name in self._groups[key]}
        return (Rows if self._flat else Stack)(slots, self._buffers[key])

    def _product_block(self, name: str) -> Block:
        pairs = self._products[name]
        if len(pairs) == 1 and name not in self._rows:
            return Outer(name, *(side[:, 0] for side in pairs[0]))
        for g, x in pairs:  # called several times: the sum of products has to be formed
            self._add(name, g, x, 1.0)
        return Rows({name: self._slots[name]}, self._rows[name])

    def grads(self) -> PerExampleGrads:
        """Return what was recorded.

        Raises:
            LayoutError: if an active tensor took no part.
        """
        for name in self._slots:
            if name not in self._rows and name not in self._products:
                raise unused(name)
        blocks = [self._factor_block(key) for key in self._groups]
        for name, slot in self._slots.items():
            if name in self._products:
                blocks.append(self._product_block(name))
            elif kind(name) == "head":
                blocks.append(Rows({name: slot}, self._rows[name]))
        return PerExampleGrads(tuple(blocks))
