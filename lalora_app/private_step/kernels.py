"""Autograd functions of trainable layers whose backward records g and x per weight.

Forward result and input gradient are those of the ordinary layer. In place of a weight gradient,
the backward records the two factors of it: g, the gradient of the layer's output, and x, its input.
Weights with ``requires_grad=False`` are not recorded, and their activations are not stored.

An input may hold the same rows for every example, such as the relative positions of DeBERTa. The
model code then expands it along the first axis, without a copy (stride 0). The kernels of LoRA
and of whole weights compute its output once and expand the result; the output gradient is each
example's own.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GradientRecorder(Protocol):
    """The interface of a function that receives the factors of a weight's gradient."""

    def __call__(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        """Record the gradient ``scale · Σ_rows g xᵀ`` per example; ``Σ_rows g`` for a bias.

        Args:
            name: wire name of the weight or bias.
            g: gradient of the output, (..., out).
            x: input, (..., in); None for a bias.
            scale: constant factor, the LoRA scale.
        """


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with ``x``: autocast's dtype if autocast is enabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _distinct(x: Tensor) -> Tensor:
    """Return x, or its first entry if all entries of the first axis are one memory (stride 0)."""
    return x[:1] if x.shape[0] > 1 and x.stride(0) == 0 else x


def _expanded(x: Tensor, size: int) -> Tensor:
    """Return x with a first axis of ``size``, as a view; x itself if it has that size."""
    return x if x.shape[0] == size else x.expand(size, *x.shape[1:])


class PlainLinear(torch.autograd.Function):
    """``y = x Wᵀ + b``, PyTorch's Linear layer with recorded gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, names: Any, record: Any) -> Tensor:
        """Return y; x (..., in) is stored only if the weight trains."""
        ctx.names, ctx.record = names, record
        x = x.to(compute_dtype(x))
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the gradients of weight and bias; return the gradient of x."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_bias:
            ctx.record(ctx.names[1], g, None)
        if need_weight:
            ctx.record(ctx.names[0], g, x)
        return (g @ weight.to(g.dtype) if need_x else None), None, None, None, None


class WholeWeight(torch.autograd.Function):
    """``y = x (W0 + W)ᵀ + b`` with a recorded gradient of the change W.

    Forward and backward compute W0 + W each for one layer at a time: no third copy of all weights
    is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor, frozen: Tensor, bias: Any, name: Any, record: Any
    ) -> Tensor:
        """Return y; x (..., in) is stored only if W trains."""
        ctx.name, ctx.record, size = name, record, x.shape[0]
        x = _distinct(x).to(compute_dtype(x))
        ctx.save_for_backward(x if change.requires_grad else None, change, frozen)
        return _expanded(F.linear(x, (frozen + change).to(x.dtype), bias), size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the gradient of W; return the gradient of x."""
        x, change, frozen = ctx.saved_tensors
        need_x, need_change = ctx.needs_input_grad[:2]
        if need_change:
            ctx.record(ctx.name, g, _expanded(x, len(g)))
        gx = g @ (frozen + change).to(g.dtype) if need_x else None
        return gx, None, None, None, None, None


class FusedLora(torch.autograd.Function):
    """``y = x Wᵀ + b + s·(x Aᵀ) Bᵀ``, scaled and added inside the matrix products.

    PEFT reads and writes the (rows, out) matrix four more times per step, to scale and add the LoRA
    branch. Here ``addmm`` does this within a matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: Any, scale: float, names: Any, record: Any
    ) -> Tensor:
        """Return y; stores z = x Aᵀ (..., r) if B trains, and x (..., in) if A trains."""
        dtype, size = compute_dtype(x), x.shape[0]
        x = _distinct(x).to(dtype)
        y = F.linear(x, base.weight, base.bias)
        z = F.linear(x, a.to(dtype))
        _rows(y).addmm_(_rows(z), b.to(dtype).T, alpha=scale)
        ctx.names, ctx.record, ctx.scale = names, record, scale
        kept = (x if a.requires_grad else None, z if b.requires_grad else None)
        ctx.save_for_backward(*kept, base.weight, a, b)
        return _expanded(y, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the gradients of the active factors; return the gradient of x."""
        x, z, weight, a, b = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        if need_b:
            ctx.record(ctx.names[1], g, _expanded(z, len(g)), ctx.scale)
        gz = g @ b.to(g.dtype) if need_x or need_a else None  # (..., r)
        if need_a:
            ctx.record(ctx.names[0], gz, _expanded(x, len(g)), ctx.scale)
        gx = None
        if gz is not None and need_x:
            gx = g @ weight.to(g.dtype)
            _rows(gx).addmm_(_rows(gz), a.to(g.dtype), alpha=ctx.scale)
        return gx, None, None, None, None, None, None


class MergedLora(torch.autograd.Function):
    """``y = x (W + s·B A)ᵀ + b`` with a precomputed merged weight W + s·B·A.

    Forward and backward need one matrix product each. The merged weights need as much memory as
    the adapted weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, merged: Tensor, bias: Any, *rest: Any
    ) -> Tensor:
        """Return y; computes and stores z = x Aᵀ only if B trains, stores x only if A trains."""
        dtype, size = compute_dtype(x), x.shape[0]
        x = _distinct(x).to(dtype)
        ctx.scale, ctx.names, ctx.record = rest
        z = F.linear(x, a.to(dtype)) if b.requires_grad else None
        ctx.save_for_backward(x if a.requires_grad else None, z, merged, b)
        return _expanded(F.linear(x, merged, bias), size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the gradients of the active factors; return the gradient of x."""
        x, z, merged, b = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        if need_b:
            ctx.record(ctx.names[1], g, _expanded(z, len(g)), ctx.scale)
        if need_a:
            ctx.record(ctx.names[0], g @ b.to(g.dtype), _expanded(x, len(g)), ctx.scale)
        gx = g @ merged.to(g.dtype) if need_x else None
        return gx, None, None, None, None, None, None, None
