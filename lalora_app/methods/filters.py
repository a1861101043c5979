"""Filters of noised gradients: the binomial filter of LA-LoRA, and three controls of it.

A control replaces the filter in an experiment that measures the filter's effect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from lalora_app.adapter.factors import Kind, kind
from lalora_app.privacy.randomness import seeded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lalora_app.private_step.gradients import NoisedGrads

TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
# Ratio of the noise's standard deviation after and before the filter, except near the borders:
# sqrt(Σ h²) = sqrt(70/256).
NOISE_FACTOR = sum(tap**2 for tap in TAPS) ** 0.5


def identity(grads: NoisedGrads) -> NoisedGrads:
    """Return the gradients unchanged: no filter."""
    return grads


def smooth(x: Tensor, dim: int = -1) -> Tensor:
    """Convolve along ``dim`` with [1, 4, 6, 4, 1]/16 under symmetric (edge-repeating) padding.

    Limit: an axis of length 1 is returned unchanged. The convolution is a sum of slices, which is
    20 times as fast as PyTorch's 1-channel convolution.
    """
    import torch

    length = x.shape[dim]
    second = min(1, length - 1)
    ends = [(second, 1), (0, 1), (0, length), (length - 1, 1), (length - 1 - second, 1)]
    # (…, length + 4, …): x1 x0 | x0 x1 … | x_last x_second-last
    padded = torch.cat([x.narrow(dim, start, size) for start, size in ends], dim=dim)
    total = TAPS[0] * padded.narrow(dim, 0, length)
    for shift, tap in enumerate(TAPS[1:], start=1):
        total.add_(padded.narrow(dim, shift, length), alpha=tap)
    return total


def _filter_factors(grads: NoisedGrads, smoothing: Callable[[Tensor, int], Tensor]) -> NoisedGrads:
    """Smooth A (r, n) along its n input features and B (m, r) along its m output features.

    Factors of the same kind and shape are stacked, to run a few operations per shape instead of a
    few operations per factor.

    Args:
        grads: noised gradients; heads and gates are returned unchanged.
        smoothing: function (tensor, dimension) -> smoothed tensor.
    """
    import torch

    from lalora_app.private_step.gradients import NoisedGrads

    groups: dict[tuple[Kind, torch.Size], list[str]] = {}
    for name, grad in grads.items():
        groups.setdefault((kind(name), grad.shape), []).append(name)
    filtered: dict[str, Tensor] = dict(grads)
    for (which, _), names in groups.items():
        if which in ("A", "B"):
            dim = 2 if which == "A" else 1  # of (factors, r, n) and (factors, m, r)
            stacked = torch.stack([grads[name] for name in names])
            filtered |= dict(zip(names, smoothing(stacked, dim).unbind(), strict=True))
    return NoisedGrads(filtered)


def binomial(grads: NoisedGrads) -> NoisedGrads:
    """LA-LoRA: smooth every factor along its feature axis (arXiv:2602.19926); heads are unchanged.

    Privacy: a fixed linear map of noised gradients; no extra cost.
    """
    return _filter_factors(grads, smooth)


@lru_cache(maxsize=64)
def _random_order(length: int, device: torch.device) -> Tensor:
    """Return the random order of ``length`` features, the same for all steps and clients."""
    import torch

    return torch.from_numpy(seeded(0, "filter order", length).permutation(length)).to(device)


def _smooth_in_random_order(x: Tensor, dim: int) -> Tensor:
    import torch

    order = _random_order(x.shape[dim], x.device)
    smoothed = smooth(x.index_select(dim, order), dim)
    return torch.empty_like(x).index_copy_(dim, order, smoothed)


def permuted(grads: NoisedGrads) -> NoisedGrads:
    """Control: apply the binomial filter after a fixed random permutation of the features.

    If neighbouring features are correlated, this control is less accurate than the filter.

    Privacy: a fixed linear map of noised gradients; no extra cost.
    """
    return _filter_factors(grads, _smooth_in_random_order)


def scaled(grads: NoisedGrads) -> NoisedGrads:
    """Control: multiply the factors' gradients by the filter's noise factor 0.523.

    Privacy: a fixed linear map of noised gradients; no extra cost.
    """
    from lalora_app.private_step.gradients import NoisedGrads

    factors = {"A": NOISE_FACTOR, "B": NOISE_FACTOR}
    return NoisedGrads({name: factors.get(kind(name), 1.0) * g for name, g in grads.items()})
