"""Random perturbations of the frozen weights during a gradient computation; no data is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    # (weight W0 + s·B·A (m, n), share of finished steps from 0 to 1, radius, generator) -> (m, n)
    Perturbation = Callable[[Tensor, float, float, torch.Generator], Tensor]


def row_scaled_noise(
    weight: Tensor, progress: float, radius: float, generator: torch.Generator
) -> Tensor:
    """Flat-LoRA: ε_i ~ N(0, (f·ρ)²·‖w_i‖²/n) for every row i (arXiv:2409.14396, eq. 10).

    f = ½(1 − cos π·progress) grows from 0 to 1 over the run.

    Args:
        weight: present weight W0 + s·B·A (m, n) of the layer.
        progress: finished steps divided by all steps of the run.
        radius: ρ, ``rule.flat-radius``. Limit: 0 gives zeros.
        generator: random generator, seeded by the run, the client and the round.

    Privacy: independent of the batch; no extra cost. All examples of a batch get the same ε.
    """
    import torch

    ramp = (1 - math.cos(math.pi * progress)) / 2
    spread = ramp * radius * weight.norm(dim=1, keepdim=True) / math.sqrt(weight.shape[1])
    noise = torch.empty_like(weight).normal_(generator=generator)
    return noise.mul_(spread)
