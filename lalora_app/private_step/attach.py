"""Replace the forward function of every trainable layer by a kernel that records gradients.

A kernel is one of the autograd functions of ``kernels.py``.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lalora_app.adapter.whole_linear import whole_layers
from lalora_app.private_step.kernels import (
    FusedLora,
    GradientRecorder,
    MergedLora,
    PlainLinear,
    WholeWeight,
    compute_dtype,
)
from lalora_app.settings.errors import ConfigError

LayerForward = Callable[[Any, Tensor], Tensor]


class LayoutError(ConfigError):
    """The model's layout does not allow per-example gradients."""


def require_grouped(name: str, x: Tensor, examples: int) -> None:
    """Check that the rows of a layer's input or output can be grouped by example.

    The first axis must be (examples · k), for example windows of images. The number of rows alone
    is no proof: 32 relative positions of shape (1, 32, d) divide into 16 examples, and belong to
    none of them.

    Args:
        name: the parameter's name, for the error.
        x: (first axis, ..., features).
        examples: number of examples in the batch.

    Raises:
        LayoutError: if the first axis is no multiple of ``examples``.
    """
    if x.shape[0] % examples:
        raise LayoutError(
            f"{name}: rows of shape {tuple(x.shape[:-1])} do not divide into {examples} examples"
        )


def linear_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Linear]:
    """Return the Linear layer of every parameter, by wire name.

    Raises:
        LayoutError: if a parameter belongs to another type of layer, or to two layers.
    """
    wanted = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in wanted]
        if not own:
            continue
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise LayoutError(f"{path} trains but is a {type(module).__name__}, not a plain Linear")
        if shared := owners.keys() & {wanted[id(p)] for p in own}:
            raise LayoutError(f"{path} shares {min(shared)} with another layer")
        owners |= {wanted[id(p)]: module for p in own}
    return owners


def _reason_not_to_fuse(layer: Any, names: Mapping[int, str]) -> str | None:
    """Return the reason why a PEFT layer cannot use a fused kernel; None if it can."""
    if len(layer.lora_A) != 1 or layer.lora_variant or layer.fan_in_fan_out:
        return "has several adapters, a LoRA variant or a transposed weight"
    (adapter,) = layer.lora_A
    if not isinstance(layer.lora_dropout[adapter], nn.Identity):
        return "has LoRA dropout"
    if layer.lora_bias[adapter] or type(layer.base_layer) is not nn.Linear:
        return "has a LoRA bias or is not a plain Linear"
    if any(id(p) in names for p in layer.base_layer.parameters()):
        return "trains its base weight or bias"
    return None


def _lora_parts(layer: Any) -> tuple[nn.Linear, nn.Linear, float]:
    """Return (layer of A, layer of B, LoRA scale)."""
    (adapter,) = layer.lora_A
    return layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]


def _lora_is_inactive(layer: Any) -> bool:
    return bool(layer.disable_adapters or layer.merged)


def _fused_forward(names: tuple[str | None, str | None], record: GradientRecorder) -> LayerForward:
    def forward(layer: Any, x: Tensor) -> Tensor:
        if _lora_is_inactive(layer):
            return layer.base_layer(x)  # type: ignore[no-any-return]
        a, b, scale = _lora_parts(layer)
        arguments = (a.weight, b.weight, layer.base_layer, scale, names, record)
        return FusedLora.apply(x, *arguments)  # type: ignore[no-any-return]

    return forward


class _MergedWeightCache:
    """The merged weight W + s·B·A, recomputed if the base weight or a factor has changed."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._weight: Tensor | None = None

    def weight(
        self, base: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        key = (scale, dtype, *((p._version, p.data_ptr()) for p in (base, a, b)))
        if self._weight is None or key != self._key:
            # No inference tensor: a weight computed in an evaluation is used in training too.
            with torch.inference_mode(False), torch.no_grad():
                wide = torch.promote_types(base.dtype, a.dtype)
                merged = torch.addmm(base.to(wide), b.to(wide), a.to(wide), alpha=scale)
                self._key, self._weight = key, merged.to(dtype)
        return self._weight


def _merged_forward(names: tuple[str | None, str | None], record: GradientRecorder) -> LayerForward:
    cache = _MergedWeightCache()

    def forward(layer: Any, x: Tensor) -> Tensor:
        if _lora_is_inactive(layer):
            return layer.base_layer(x)  # type: ignore[no-any-return]
        a, b, scale = _lora_parts(layer)
        base = layer.base_layer
        merged = cache.weight(base.weight, a.weight, b.weight, scale, compute_dtype(x))
        arguments = (a.weight, b.weight, merged, base.bias, scale, names, record)
        return MergedLora.apply(x, *arguments)  # type: ignore[no-any-return]

    return forward


def _plain_forward(names: tuple[str | None, str | None], record: GradientRecorder) -> LayerForward:
    def forward(layer: Any, x: Tensor) -> Tensor:
        return PlainLinear.apply(x, layer.weight, layer.bias, names, record)  # type: ignore[no-any-return]

    return forward


def _whole_forward(name: str | None, record: GradientRecorder) -> LayerForward:
    def forward(layer: Any, x: Tensor) -> Tensor:
        base = layer.base_layer
        arguments = (layer.lora_W.weight, base.weight, base.bias, name, record)
        return WholeWeight.apply(x, *arguments)  # type: ignore[no-any-return]

    return forward


_LORA_KERNELS = {"fused": _fused_forward, "merged": _merged_forward}
KERNELS = frozenset({*_LORA_KERNELS, "plain"})


def replace_forward(layer: nn.Module, forward: LayerForward) -> None:
    """Set ``forward(layer, x)`` as the forward function of the layer."""
    layer.forward = MethodType(forward, layer)


def attach_kernels(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], kernel: str, record: GradientRecorder
) -> None:
    """Replace the forward function of every trainable layer; its backward calls ``record``.

    Args:
        model: the model, changed in place.
        parameters: wire name -> trainable parameter, each the weight or bias of a Linear layer.
        kernel: ``fused``, ``merged`` or ``plain``. With ``fused``, a PEFT layer that cannot be
            fused uses ``plain``. A layer of whole weights has one kernel for all of them.
        record: function that receives the gradients.

    Raises:
        LayoutError: if a parameter belongs to another type of layer, or a layer cannot be merged.
    """
    from peft.tuners.lora import Linear as LoraLinear

    owners = linear_layers(model, parameters)
    names = {id(p): name for name, p in parameters.items()}
    done: set[int] = set()
    modules = model.named_modules() if kernel in _LORA_KERNELS else ()
    for path, layer in ((path, m) for path, m in modules if type(m) is LoraLinear):
        reason = _reason_not_to_fuse(layer, names)
        if reason and kernel == "merged":
            raise LayoutError(f'lora.kernel="merged" does not fit {path}, which {reason}')
        if reason:
            continue
        pair = _lora_parts(layer)[:2]
        keys = (names.get(id(pair[0].weight)), names.get(id(pair[1].weight)))
        replace_forward(layer, _LORA_KERNELS[kernel](keys, record))
        done |= {id(part) for part in pair}
    for whole in whole_layers(model).values():
        replace_forward(whole, _whole_forward(names.get(id(whole.lora_W.weight)), record))
        done.add(id(whole.lora_W))
    for linear in {id(layer): layer for layer in owners.values()}.values():
        if id(linear) not in done:
            keys = (names.get(id(linear.weight)), names.get(id(linear.bias)))
            replace_forward(linear, _plain_forward(keys, record))
