"""Perturbations of the frozen weights while a gradient is taken: drawn without the data."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# (a layer's weight W0 + s·B·A (m, n), how far the run is from 0 to 1, radius, generator) -> (m, n)
Perturbation = Callable[[Tensor, float, float, torch.Generator], Tensor]


def row_scaled_noise(
    weight: Tensor, progress: float, radius: float, generator: torch.Generator
) -> Tensor:
    """Flat-LoRA: ε_i ~ N(0, (f·ρ)²·‖w_i‖²/n) for every row i (arXiv:2409.14396, eq. 10).

    f = ½(1 − cos π·progress) grows from 0 to 1 over the run.

    Args:
        weight: (m, n), of the layer as it computes now.
        progress: steps done over all steps of the run.
        radius: ρ, ``rule.flat-radius``; 0 perturbs nothing.
        generator: seeded by the run, the client and the round.

    Privacy: independent of the batch, so free. All examples of a batch see the same ε.
    """
    ramp = (1 - math.cos(math.pi * progress)) / 2
    spread = ramp * radius * weight.norm(dim=1, keepdim=True) / math.sqrt(weight.shape[1])
    noise = torch.empty_like(weight).normal_(generator=generator)
    return noise.mul_(spread)
