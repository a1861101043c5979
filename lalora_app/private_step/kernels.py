"""Autograd functions of the adapted layers: the backward keeps one gradient an example.

Each has the ordinary layer's forward and input gradient, records what its weight gradients are
made of, and returns none for the weights. A weight with ``requires_grad=False`` is not recorded,
and the activation that its gradient would need is not kept.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GradientRecorder(Protocol):
    """Takes what a weight's gradient is made of."""

    def __call__(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        """Record ``scale · Σ_rows g xᵀ`` an example; of a bias (``x=None``) ``Σ_rows g``."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that a matrix product of ``x`` runs in here: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class PlainLinear(torch.autograd.Function):
    """``y = x Wᵀ + b`` of a trainable Linear layer, as PyTorch computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, names: Any, record: Any) -> Tensor:
        """Return y; x (..., in) is kept only for a weight that trains."""
        ctx.names, ctx.record = names, record
        x = x.to(compute_dtype(x))
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the weight's and the bias's gradient; return x's."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_bias:
            ctx.record(ctx.names[1], g, None)
        if need_weight:
            ctx.record(ctx.names[0], g, x)
        return (g @ weight.to(g.dtype) if need_x else None), None, None, None, None


class FusedLora(torch.autograd.Function):
    """``y = x Wᵀ + b + s·(x Aᵀ) Bᵀ`` with the LoRA branch added inside the matrix products.

    PEFT makes four passes over (rows, out) for scaling and adding, forward and backward; here
    they are the epilogue of a product that runs anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: Any, scale: float, names: Any, record: Any
    ) -> Tensor:
        """Return y; keeps z = x Aᵀ (..., r) if B trains, and x (..., in) if A trains."""
        dtype = compute_dtype(x)
        x = x.to(dtype)
        y = F.linear(x, base.weight, base.bias)
        z = F.linear(x, a.to(dtype))
        _rows(y).addmm_(_rows(z), b.to(dtype).T, alpha=scale)
        ctx.names, ctx.record, ctx.scale = names, record, scale
        kept = (x if a.requires_grad else None, z if b.requires_grad else None)
        ctx.save_for_backward(*kept, base.weight, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the active factors' gradients; return x's."""
        x, z, weight, a, b = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        if need_b:
            ctx.record(ctx.names[1], g, z, ctx.scale)
        gz = g @ b.to(g.dtype) if need_x or need_a else None  # (..., r)
        if need_a:
            ctx.record(ctx.names[0], gz, x, ctx.scale)
        gx = None
        if gz is not None and need_x:
            gx = g @ weight.to(g.dtype)
            _rows(gx).addmm_(_rows(gz), a.to(g.dtype), alpha=ctx.scale)
        return gx, None, None, None, None, None, None


class MergedLora(torch.autograd.Function):
    """``y = x (W + s·B A)ᵀ + b`` with the merged weight given: one product a direction.

    It costs one more copy of the adapted weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, merged: Tensor, bias: Any, *rest: Any
    ) -> Tensor:
        """Return y; computes and keeps z = x Aᵀ only if B trains, and x only if A trains."""
        dtype = compute_dtype(x)
        x = x.to(dtype)
        ctx.scale, ctx.names, ctx.record = rest
        z = F.linear(x, a.to(dtype)) if b.requires_grad else None
        ctx.save_for_backward(x if a.requires_grad else None, z, merged, b)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """Record the active factors' gradients; return x's."""
        x, z, merged, b = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        if need_b:
            ctx.record(ctx.names[1], g, z, ctx.scale)
        if need_a:
            ctx.record(ctx.names[0], g @ b.to(g.dtype), x, ctx.scale)
        gx = g @ merged.to(g.dtype) if need_x else None
        return gx, None, None, None, None, None, None, None
