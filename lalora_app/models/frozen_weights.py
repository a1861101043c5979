"""Change the frozen base weights: add the drift or a temporary perturbation, restore exactly."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalora_app.adapter.factors import Adapter, factor_pairs
from lalora_app.adapter.whole_linear import WholeLinear, whole_layers

Change = Callable[[Tensor], Tensor]  # (a layer's weight W0 + s·B·A (m, n)) -> its change


def base_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers by the wire name of their B, or of their W."""
    from peft.tuners.lora import Linear as LoraLinear

    return {f"{path}.lora_W.weight": layer for path, layer in whole_layers(model).items()} | {
        f"{path}.lora_B.weight": layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
    }


class FrozenWeights:
    """The frozen weights of the adapted layers, and their originals.

    Args:
        layers: the adapted layers by the wire name of their B, or of their W.
    """

    def __init__(self, layers: Mapping[str, Any]):
        self._layers = dict(layers)
        self._pristine: dict[str, Tensor] = {}  # copies of changed weights

    @property
    def names(self) -> list[str]:
        """The wire names of the layers' B, or W."""
        return list(self._layers)

    def weight(self, name: str) -> Tensor:
        """Return a layer's frozen weight (m, n), by the layer's name in ``names``."""
        weight: Tensor = self._layers[name].base_layer.weight
        return weight

    @torch.no_grad()
    def set_drift(self, drift: Adapter) -> None:
        """Set every weight to ``W0 + B·A`` of the drift, or to W0 if it has no drift.

        Always computed from W0 in float32, so that rounding does not accumulate.
        """
        for b, a in factor_pairs(drift):
            weight = self.weight(b)
            pristine = self._pristine.setdefault(b, weight.detach().clone())
            left, right = (torch.from_numpy(drift[n]).to(weight.device) for n in (b, a))
            weight.copy_(torch.addmm(pristine.float(), left, right))
        for name in self._pristine.keys() - drift.keys():
            self.weight(name).copy_(self._pristine.pop(name))

    def computed(self, name: str) -> Tensor:
        """Return W0 + s·B·A of a layer, or W0 + W of a whole one, in float32."""
        layer = self._layers[name]
        if isinstance(layer, WholeLinear):
            return layer.weight().detach().float()
        (adapter,) = layer.lora_A
        b, a = layer.lora_B[adapter].weight.float(), layer.lora_A[adapter].weight.float()
        return torch.addmm(self.weight(name).float(), b, a, alpha=layer.scaling[adapter])

    @contextlib.contextmanager
    def with_input_hook(self, watch: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call ``watch`` with every layer's name in ``names`` and inputs, within the block."""

        def hook(name: str) -> Any:
            return lambda layer, inputs: watch(name, inputs[0])

        hooks = [x.register_forward_pre_hook(hook(name)) for name, x in self._layers.items()]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @contextlib.contextmanager
    def perturbed(self, change: Change | None) -> Iterator[None]:
        """Add ``change`` to every weight within the block, then restore all bit for bit."""
        if change is None:
            yield
            return
        originals = {name: self.weight(name).detach().clone() for name in self._layers}
        try:
            with torch.no_grad():
                self._write({n: w.float() + change(self.computed(n)) for n, w in originals.items()})
            yield
        finally:
            self._write(originals)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.weight(name).copy_(weight)
