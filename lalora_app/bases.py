"""The frozen weights below the adapters: moved by a run's drift, shaken for a step, restored."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalora_app.adapter import Adapter, pairs

Change = Callable[[Tensor], Tensor]  # (a layer's weight W0 + s·B·A (m, n)) -> what is added to it


def base_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA layers by the wire name of their B."""
    from peft.tuners.lora import Linear as LoraLinear

    return {
        f"{path}.lora_B.weight": layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
    }


class Bases:
    """The frozen weights of the adapted layers, and what has been done to them.

    Args:
        layers: PEFT's LoRA layers by the wire name of their B.
    """

    def __init__(self, layers: Mapping[str, Any]):
        self._layers = dict(layers)
        self._pristine: dict[str, Tensor] = {}  # copies of what has ever been moved

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self._layers[name].base_layer.weight
        return weight

    @torch.no_grad()
    def move(self, drift: Adapter) -> None:
        """Make every weight ``W0 + B·A`` of the drift, or W0 where it has none.

        Always from W0, in float32: nothing is lost by moving often.
        """
        for b, a in pairs(drift):
            weight = self._weight(b)
            pristine = self._pristine.setdefault(b, weight.detach().clone())
            left, right = (torch.from_numpy(drift[n]).to(weight.device) for n in (b, a))
            weight.copy_(torch.addmm(pristine.float(), left, right))
        for name in self._pristine.keys() - drift.keys():
            self._weight(name).copy_(self._pristine.pop(name))

    def _computed(self, name: str) -> Tensor:
        """Return W0 + s·B·A of a layer, in float32."""
        layer = self._layers[name]
        (adapter,) = layer.lora_A
        b, a = layer.lora_B[adapter].weight.float(), layer.lora_A[adapter].weight.float()
        return torch.addmm(self._weight(name).float(), b, a, alpha=layer.scaling[adapter])

    @contextlib.contextmanager
    def shaken(self, change: Change | None) -> Iterator[None]:
        """Add ``change`` to every weight within the block, and restore them bit for bit."""
        if change is None:
            yield
            return
        kept = {name: self._weight(name).detach().clone() for name in self._layers}
        try:
            with torch.no_grad():
                for name, weight in kept.items():
                    self._weight(name).copy_(weight.float() + change(self._computed(name)))
            yield
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    self._weight(name).copy_(weight)
