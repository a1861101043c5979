"""The mechanism: Poisson batch -> flat clip an example -> sum -> Gaussian noise -> fixed scale.

``ĝ = (Σ_i g_i · min(1, C/‖g_i‖₂) + N(0, (z·C)² I)) / (q·n)``: Abadi et al., arXiv:1607.00133,
Alg. 1, with Poisson sampling and the constant q·n instead of the realised batch size.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lalora_app.private_step.gradients import NoisedGrads, PerExampleGrads

# The float32 norm of a million entries may be 3e-6 too small; the clip stays below that.
CLIP_MARGIN = 1 - 1e-5


def poisson_batch(size: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw each of ``size`` indices independently with probability ``rate``; may be empty."""
    return np.flatnonzero(rng.random(size) < rate)


def clip_scales(norms: Tensor, clip_norm: float) -> Tensor:
    """Return (examples,): the factor that brings each example's joint norm down to C.

    A non-finite example gets the scale 0. Limit: ``clip_norm=inf`` gives 1 for every finite one.
    """
    scales = (clip_norm * CLIP_MARGIN / norms).clamp(max=1.0)  # norm 0: inf, clamped to 1
    return scales.nan_to_num_(nan=0.0)  # norm nan: nan; norm inf: C/inf = 0, or inf/inf = nan


def _may_be_any(chosen: Tensor) -> bool:
    """Tell whether any may be true. A GPU is not asked: the answer would halt its queue."""
    return chosen.device.type != "cpu" or torch.compiler.is_compiling() or bool(chosen.any())


def clipped_sum(grads: PerExampleGrads, clip_norm: float) -> dict[str, Tensor]:
    """Return Σ_i of the clipped examples: sensitivity ``clip_norm`` to any one example.

    The norm is flat, over all active tensors of an example together, and is taken of the very
    numbers that are summed. Non-finite examples are zeroed, never scaled: 0·inf would poison the
    sum.
    """
    scales = clip_scales(grads.norms(), clip_norm)
    dropped = scales == 0
    if _may_be_any(dropped):
        grads = grads.zero_examples(dropped)
    return grads.weighted_sum(scales)


def _device_normals(size: int, like: Tensor, seed: int) -> Tensor:
    """Draw by the GPU's own Philox generator; nothing waits for the host."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


def _sum_of_two_normals(size: int, like: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw N(0, 1) entries as the sum of two draws of the device, each scaled by 1/√2.

    A device's generator takes 63 bits as its key, few enough to be tried one by one. Of the sum
    both keys must be found together.
    """
    first, second = (
        _device_normals(size, like, int(seed)) for seed in rng.integers(1 << 63, size=2)
    )
    return first.add_(second).mul_(math.sqrt(0.5))


def _standard_normals(size: int, like: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw N(0, 1) entries of ``like``'s type on its device.

    On a CPU in float64 from the stream itself; on a GPU from its own generator, seeded anew for
    every release with twice 63 bits of the stream.
    """
    if like.device.type == "cpu":
        return torch.from_numpy(rng.standard_normal(size)).to(like)
    return _sum_of_two_normals(size, like, rng)


def add_noise(
    sums: Mapping[str, Tensor],
    *,
    noise_std: float,
    expected_batch: float,
    rng: np.random.Generator,
) -> NoisedGrads:
    """Add N(0, noise_std²) to every entry of the clipped sums and divide by q·n.

    Args:
        sums: clipped sums; all zeros for an empty batch, which is then pure noise. Left as is.
        noise_std: noise multiplier times clip norm; 0 leaves the sums as they are.
        expected_batch: q·n, a constant of the run and never the realised batch size.
        rng: the noise stream, secret where the result is to be private.
    """
    totals = list(sums.values())
    sizes = [total.numel() for total in totals]
    noise = torch.split(_standard_normals(sum(sizes), totals[0], rng), sizes)
    shaped = [part.view(total.shape) for part, total in zip(noise, totals, strict=True)]
    noised = torch._foreach_add(totals, shaped, alpha=noise_std)
    torch._foreach_div_(noised, expected_batch)
    return NoisedGrads(dict(zip(sums, noised, strict=True)))
