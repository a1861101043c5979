"""A Linear layer whose whole weight trains: the frozen weight W0 plus its change, a tensor W."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WholeLinear(nn.Module):
    """``y = x (W0 + W)ᵀ + b`` with frozen W0 and b; W (m, n) is zero at the start.

    The change is a tensor of its own, as LoRA's factors are: the frozen weight stays as it was
    loaded, and only W travels.

    Args:
        base_layer: the layer of W0 and b.
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        sizes = (base_layer.in_features, base_layer.out_features)
        self.lora_W = nn.Linear(*sizes, bias=False)  # its weight is W
        nn.init.zeros_(self.lora_W.weight)

    def weight(self) -> Tensor:
        """Return W0 + W (m, n)."""
        weight: Tensor = self.base_layer.weight + self.lora_W.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., m) of x (..., n)."""
        return F.linear(x, self.weight(), self.base_layer.bias)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """Return a copy of the frozen layer with the weight W0 + W, in float32."""
        layer = copy.deepcopy(self.base_layer).float()
        layer.weight.copy_(self.weight())
        return layer


def whole_layers(model: nn.Module) -> dict[str, WholeLinear]:
    """Return all layers of whole weights by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, WholeLinear)}
