"""Post-processing of noised gradients: the binomial filter of LA-LoRA and its controls."""

import torch
from torch import Tensor

from lalora_app.adapter import Kind, kind
from lalora_app.privacy.types import NoisedGrads

TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
# Standard deviation of filtered white noise, away from the borders: sqrt(Σ h²) = sqrt(70/256).
NOISE_FACTOR = sum(tap**2 for tap in TAPS) ** 0.5


def identity(grads: NoisedGrads) -> NoisedGrads:
    """Leave the gradients as they are."""
    return grads


def smooth(rows: Tensor) -> Tensor:
    """Convolve each row with [1, 4, 6, 4, 1]/16 under symmetric (edge-repeating) padding.

    Args:
        rows: (r, length); a row of length 1 is returned as it is.
    """
    length = rows.shape[1]
    second = min(1, length - 1)
    padded = torch.cat(  # (r, length + 4): x1 x0 | x0 x1 ... | x_last x_second-last
        [
            rows[:, second : second + 1],
            rows[:, :1],
            rows,
            rows[:, -1:],
            rows[:, length - 1 - second : length - second],
        ],
        dim=1,
    )
    total = TAPS[0] * padded[:, :length]
    for shift, tap in enumerate(TAPS[1:], start=1):
        total = total + tap * padded[:, shift : shift + length]
    return total


def _smooth_as(which: Kind, grad: Tensor) -> Tensor:
    match which:
        case "A":
            return smooth(grad)
        case "B":
            return smooth(grad.T).T
        case "head":
            return grad


def binomial(grads: NoisedGrads) -> NoisedGrads:
    """Smooth every factor along its long axis (arXiv:2602.19926, gradient filter); not the head.

    A (r, n) is filtered along its n input features, B (m, r) along its m output features.

    Privacy: a fixed linear map of noised gradients; no extra cost.
    """
    return NoisedGrads({name: _smooth_as(kind(name), grad) for name, grad in grads.items()})


def scaled(grads: NoisedGrads) -> NoisedGrads:
    """Control of the filter: shrink the factors by its noise factor 0.523 instead of filtering.

    Privacy: a fixed linear map of noised gradients; no extra cost.
    """
    factors = {"A": NOISE_FACTOR, "B": NOISE_FACTOR, "head": 1.0}
    return NoisedGrads({name: factors[kind(name)] * grad for name, grad in grads.items()})
