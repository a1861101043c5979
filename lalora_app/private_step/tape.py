"""Record the factors of weight gradients during one backward pass, as per-example gradients.

A layer's backward calls :meth:`GradientTape.record` with the output gradient g and the input x; the
per-example gradient of its weight is Σ_rows g xᵀ over the rows of one example.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lalora_app.adapter.factors import kind
from lalora_app.private_step.attach import LayoutError, require_grouped
from lalora_app.private_step.gradients import (
    Block,
    FlatBlock,
    OuterProductBlock,
    PerExampleGrads,
    RowsBlock,
    StackedBlock,
    StoredShape,
)


def stored_shape_of(shape: tuple[int, ...], *, flat: bool) -> StoredShape:
    """Choose the memory order of a tensor's gradient.

    Args:
        shape: shape of the tensor.
        flat: whether gradients share one flat buffer; then nothing is transposed.

    Matrices with more rows than columns are stored transposed. The batched product then writes
    long rows, which is several times as fast on a CPU.
    """
    tall = len(shape) == 2 and shape[0] > shape[1]
    return StoredShape(shape, transposed=tall and not flat)


def unused_parameter_error(name: str) -> LayoutError:
    """Return the error for an active tensor that got no gradient in a backward pass."""
    return LayoutError(f"{name} is active but took no part in the forward pass")


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float, first: bool) -> None:
    """Add ``scale · leftᵀ right`` per example to ``into`` (examples, i, j).

    Args:
        into: the result, changed in place.
        left: (examples, rows, i).
        right: (examples, rows, j).
        scale: the factor of the product.
        first: whether ``into`` is uninitialised memory, to be overwritten.
    """
    low_precision = left.dtype == right.dtype != into.dtype
    if low_precision and left.device.type != "cpu":  # a GPU sums bf16 products in fp32 by itself
        product = torch.bmm(left.mT, right, out_dtype=into.dtype).mul_(scale)
        into.copy_(product) if first else into.add_(product)
    else:
        wide = (left.to(into.dtype).mT, right.to(into.dtype))
        into.baddbmm_(*wide, beta=0.0 if first else 1.0, alpha=scale)


GroupKey = tuple[int, ...]


class BufferLayout:
    """The assignment of the active tensors' gradients to shared buffers.

    It depends on the set of active tensors only, so it is computed once per set.

    Args:
        shapes: stored shape of every active tensor.
        flat: whether all factors share one (examples, entries) buffer; otherwise one buffer per
            shape.
    """

    def __init__(self, shapes: Mapping[str, StoredShape], flat: bool):
        self.shapes, self.flat = dict(shapes), flat
        self.heads = [name for name in shapes if kind(name) == "head"]
        self.whole = [name for name in shapes if kind(name) == "W"]  # never formed: no buffer
        self.groups: dict[GroupKey, dict[str, StoredShape]] = {}  # factors per shared buffer
        for name, stored_shape in shapes.items():
            if kind(name) not in ("head", "W"):
                self.groups.setdefault(() if flat else stored_shape.stored, {})[name] = stored_shape
        self.group_of = {name: key for key, names in self.groups.items() for name in names}

    def allocate(
        self, key: GroupKey, examples: int, like: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Allocate the buffer of one group.

        Args:
            key: the group's key in ``groups``.
            examples: number of examples in the batch.
            like: a tensor of the wanted device and precision (float32 at least).

        Returns:
            (uninitialised buffer, its view (examples, *stored shape) per tensor name).
        """
        shapes, dtype = self.groups[key], torch.promote_types(like.dtype, torch.float32)
        if not self.flat:
            buffer = like.new_empty((len(shapes), examples, math.prod(key)), dtype=dtype)
            views = torch.unflatten(buffer, 2, key).unbind()
            return buffer, dict(zip(shapes, views, strict=True))
        sizes = [stored_shape.size for stored_shape in shapes.values()]
        buffer = like.new_empty((examples, sum(sizes)), dtype=dtype)
        parts = zip(shapes.items(), torch.split(buffer, sizes, dim=1), strict=True)
        return buffer, {name: torch.unflatten(part, 1, s.stored) for (name, s), part in parts}


class GradientTape:
    """The per-example gradients of one batch, collected while its backward pass runs.

    Args:
        examples: number of examples in the batch; the rows of every layer are grouped by example.
        layout: buffer layout of the active tensors.
    """

    def __init__(self, examples: int, layout: BufferLayout):
        self._examples, self._layout = examples, layout
        self._buffers: dict[GroupKey, Tensor] = {}
        self._views: dict[str, Tensor] = {}  # name -> (examples, *stored)
        self._written: set[str] = set()
        self._products: dict[str, list[tuple[Tensor, Tensor]]] = {}  # name -> (g, x) of a call

    def _by_example(self, name: str, x: Tensor) -> Tensor:
        require_grouped(name, x, self._examples)
        return x.reshape(self._examples, -1, x.shape[-1])

    def record(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        """Add ``scale · Σ_rows g xᵀ`` per example, or ``Σ_rows g`` for a bias.

        Implements :class:`~lalora_app.private_step.kernels.GradientRecorder`. Sums are computed in
        float32 at least, also for bf16 operands. Several calls of one layer are added. Of a whole
        weight, g and x are kept as they are, and their product is not formed.

        Raises:
            LayoutError: if the rows are not grouped by example, see :func:`require_grouped`.
        """
        g = self._by_example(name, g)  # (examples, rows, out)
        if x is None:
            self._add_bias(name, g)
            return
        x = self._by_example(name, x)  # (examples, rows, in)
        if name in self._layout.whole:
            self._products.setdefault(name, []).append((g.detach(), x.detach()))
        elif g.shape[1] == 1 and name in self._layout.heads:
            wide = torch.promote_types(g.dtype, torch.float32)
            sides = (g.detach().to(wide), x.detach().to(wide))  # detach: x may keep its graph alive
            self._products.setdefault(name, []).append(sides)
        else:
            self._add(name, g, x, scale)

    def _add_bias(self, name: str, g: Tensor) -> None:
        total = g.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
        self._views[name] = self._views[name] + total if name in self._written else total
        self._written.add(name)

    def _add(self, name: str, g: Tensor, x: Tensor, scale: float) -> None:
        stored_shape, first = self._layout.shapes[name], name not in self._written
        if name not in self._views:
            self._allocate(name, g)
        left, right = (x, g) if stored_shape.transposed else (g, x)
        _add_product(self._views[name], left, right, scale, first)
        self._written.add(name)

    def _allocate(self, name: str, like: Tensor) -> None:
        if name in self._layout.heads:
            shape = (self._examples, *self._layout.shapes[name].stored)
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._views[name] = like.new_empty(shape, dtype=dtype)
            return
        key = self._layout.group_of[name]
        self._buffers[key], views = self._layout.allocate(key, self._examples, like)
        self._views |= views

    def _head_block(self, name: str) -> Block:
        pairs = self._products.get(name, [])
        if len(pairs) == 1 and name not in self._written:
            return OuterProductBlock(name, *(side[:, 0] for side in pairs[0]))
        for g, x in pairs:  # several calls: the sum of outer products must be formed
            self._add(name, g, x, 1.0)
        return FlatBlock({name: self._layout.shapes[name]}, self._views[name].flatten(1))

    def _whole_block(self, name: str) -> RowsBlock:
        pairs = self._products[name]
        g, x = pairs[0] if len(pairs) == 1 else (torch.cat(s, 1) for s in zip(*pairs, strict=True))
        return RowsBlock(name, g, x)

    def grads(self) -> PerExampleGrads:
        """Return the recorded per-example gradients.

        Raises:
            LayoutError: if an active tensor got no gradient.
        """
        for name in self._layout.shapes:
            if name not in self._written and name not in self._products:
                raise unused_parameter_error(name)
        block = FlatBlock if self._layout.flat else StackedBlock
        factors = [block(shapes, self._buffers[k]) for k, shapes in self._layout.groups.items()]
        whole = map(self._whole_block, self._layout.whole)
        return PerExampleGrads((*factors, *whole, *map(self._head_block, self._layout.heads)))
