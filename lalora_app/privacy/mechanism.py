"""The mechanism: Poisson batch -> flat clip an example -> sum -> Gaussian noise -> fixed scale.

``ĝ = (Σ_i g_i · min(1, C/‖g_i‖₂) + N(0, (z·C)² I)) / (q·n)``: Abadi et al., arXiv:1607.00133,
Alg. 1, with Poisson sampling and the constant q·n instead of the realised batch size.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lalora_app.privacy.types import NoisedGrads, PerExampleGrads

# Rounding of the sums may exceed C by about 1e-7 relative; the clip stays below it.
CLIP_MARGIN = 1 - 1e-6


def poisson_batch(size: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw each of ``size`` indices independently with probability ``rate``; may be empty."""
    return np.flatnonzero(rng.random(size) < rate)


def clip_scales(grads: PerExampleGrads, clip_norm: float) -> Tensor:
    """Return (examples,): the factor that brings each example's joint norm down to C.

    The norm is flat, over all active tensors of the example together. A non-finite example gets
    the scale 0. Limit: ``clip_norm=inf`` gives 1 for every finite example.
    """
    squares = [grad.flatten(1).square().sum(1) for grad in grads.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    scales = (clip_norm * CLIP_MARGIN / norms).clamp(max=1.0)  # norm 0: inf, clamped to 1
    return torch.where(norms.isfinite(), scales, torch.zeros_like(scales))


def clipped_sum(grads: PerExampleGrads, clip_norm: float) -> dict[str, Tensor]:
    """Return Σ_i of the clipped examples: sensitivity ``clip_norm`` to any one example.

    Non-finite examples are zeroed, never scaled: 0·inf would poison the sum.
    """
    scales = clip_scales(grads, clip_norm)
    kept = scales > 0

    def summed(grad: Tensor) -> Tensor:
        rows = grad.flatten(1)  # (examples, size)
        finite = torch.where(kept[:, None], rows, torch.zeros_like(rows))
        return (scales.to(rows.dtype) @ finite).reshape(grad.shape[1:])

    return {name: summed(grad) for name, grad in grads.items()}


def add_noise(
    sums: Mapping[str, Tensor],
    *,
    noise_std: float,
    expected_batch: float,
    rng: np.random.Generator,
) -> NoisedGrads:
    """Add N(0, noise_std²) to every entry of the clipped sums and divide by q·n.

    Args:
        sums: clipped sums; all zeros for an empty batch, which is then pure noise.
        noise_std: noise multiplier times clip norm; 0 leaves the sums as they are.
        expected_batch: q·n, a constant of the run and never the realised batch size.
        rng: the noise stream. Drawn in float64, cast to the gradients' type.
    """
    noised = {}
    for name, total in sums.items():
        noise = torch.from_numpy(rng.standard_normal(tuple(total.shape)))
        noised[name] = (total + noise_std * noise.to(total)) / expected_batch
    return NoisedGrads(noised)
