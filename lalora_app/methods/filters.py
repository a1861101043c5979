"""Filters of noised gradients (LA-LoRA's, three controls of it), and HetLoRA's penalty.

A control replaces the filter in an experiment that measures the filter's effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from lalora_app.adapter.factors import Kind, factor_pairs, kind
from lalora_app.aggregation.padded_average import kept_directions
from lalora_app.privacy.randomness import seeded
from lalora_app.settings.run_config import MethodNumbers

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


def no_penalty(
    grads: NoisedGrads, tensors: Mapping[str, Tensor], numbers: MethodNumbers
) -> NoisedGrads:
    """Return the gradients unchanged: the loss has no term of the tensors alone."""
    return grads


def _slope(own: Tensor, other: Tensor) -> Tensor:
    """Return the gradient of ‖own‖·‖other‖ by ``own``; zero for a zero ``own``."""
    slope: Tensor = (own / own.norm()).nan_to_num(nan=0.0) * other.norm()
    return slope


def _tail_slopes(tensors: Mapping[str, Tensor], numbers: MethodNumbers) -> dict[str, Tensor]:
    """Return the gradient of Σ ‖B[:, k:]‖_F·‖A[k:, :]‖_F by A and B of every layer."""
    from torch.nn.functional import pad

    slopes = {}
    for b, a in factor_pairs(tensors):
        kept = kept_directions(len(tensors[a]), numbers)
        left, right = tensors[b].detach()[:, kept:], tensors[a].detach()[kept:]
        slopes[b] = pad(_slope(left, right), (kept, 0))  # the first columns are zero
        slopes[a] = pad(_slope(right, left), (0, 0, kept, 0))  # the first rows
    return slopes


def tail_penalty(
    grads: NoisedGrads, tensors: Mapping[str, Tensor], numbers: MethodNumbers
) -> NoisedGrads:
    """HetLoRA: add the gradient of λ·Σ ‖B[:, k:]‖_F·‖A[k:, :]‖_F (arXiv:2401.06432, §3.2).

    The sum is over all layers, k is ⌊γ·r⌋, γ is ``rule.rank-decay`` and λ ``rule.tail-penalty``.
    The penalty depends on no example, so its gradient is added after clip and noise; inside of the
    clip it would take room from the examples' gradients. Limit: γ = 1 or λ = 0 changes no bit.

    Args:
        grads: noised gradients of the tensors that train in this step.
        tensors: the present tensors, with A (r, n) and B (m, r) of every layer.
        numbers: the table ``rule`` of the run config.

    Privacy: a function of noised gradients and of tensors made of them; no extra cost.
    """
    from lalora_app.private_step.gradients import NoisedGrads

    weight = numbers.tail_penalty
    if weight == 0 or numbers.rank_decay == 1:
        return grads
    slopes = _tail_slopes(tensors, numbers)
    added = {name: g + weight * slopes[name] for name, g in grads.items() if name in slopes}
    return NoisedGrads(grads | added)
