"""Noise is added in :func:`add_noise`, examples are clipped in :func:`clipped_sum`, both here.

The subsampled Gaussian mechanism draws a Poisson batch, clips the gradient of each example, sums,
adds Gaussian noise and divides by a constant:
``ĝ = (Σ_i g_i · min(1, C/‖g_i‖₂) + N(0, (z·C)² I)) / (q·n)`` (Abadi et al., arXiv:1607.00133,
Alg. 1), with Poisson sampling, and with the constant q·n in place of the realised batch size.
C is the clipping norm, z the noise multiplier, q the sampling rate, n the number of examples.
With automatic clipping (Bu et al., arXiv:2206.07136) the factor of an example is C/(‖g_i‖₂ + γ).
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lalora_app.private_step.gradients import NoisedGrads, PerExampleGrads

# A float32 norm over a million entries can be too small by a factor of 1 - 3e-6. Clipping to a
# slightly smaller norm keeps the true norm below C.
CLIP_MARGIN = 1 - 1e-5
AUTOMATIC_SHIFT = 0.01  # γ of automatic clipping, the paper's value


def poisson_batch(size: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a Poisson batch: each index below ``size`` with probability ``rate``; may be empty."""
    return np.flatnonzero(rng.random(size) < rate)


def clip_scales(norms: Tensor, clip_norm: float) -> Tensor:
    """Return (examples,): the factor min(1, C/‖g_i‖) of every example.

    Args:
        norms: (examples,), the norm of each example over all active tensors together.
        clip_norm: C. Limit: inf gives 1 for every finite norm.

    C is reduced by ``CLIP_MARGIN``. A norm that is not finite gets the factor 0.
    """
    scales = (clip_norm * CLIP_MARGIN / norms).clamp(max=1.0)  # norm 0: inf, clamped to 1
    return scales.nan_to_num_(nan=0.0)  # norm nan: nan; norm inf: C/inf = 0, or inf/inf = nan


def automatic_scales(norms: Tensor, clip_norm: float) -> Tensor:
    """Return (examples,): the factor C/(‖g_i‖ + γ) of every example, with γ = 0.01.

    The scaled norm is C·‖g_i‖/(‖g_i‖ + γ), below C for every gradient. Limits: near 0 for
    ‖g_i‖ ≪ γ, near C for ‖g_i‖ ≫ γ.

    Args:
        norms: (examples,), the norm of each example over all active tensors together.
        clip_norm: C, finite.

    C is reduced by ``CLIP_MARGIN``. A norm that is not finite gets the factor 0.
    """
    scales = clip_norm * CLIP_MARGIN / (norms + AUTOMATIC_SHIFT)
    return scales.nan_to_num_(nan=0.0)


# privacy.clipping -> the factors of the examples; no factor makes a norm larger than C.
CLIPPINGS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "flat": clip_scales,
    "automatic": automatic_scales,
}


def _may_contain_true(chosen: Tensor) -> bool:
    """Return False only if no entry is true; on a GPU always True, to avoid a synchronisation."""
    return chosen.device.type != "cpu" or torch.compiler.is_compiling() or bool(chosen.any())


def clipped_sum(
    grads: PerExampleGrads, clip_norm: float, clipping: str = "flat"
) -> dict[str, Tensor]:
    """Scale the gradient of every example to at most the norm C and return the sum over examples.

    The norm of an example is taken over all active tensors together, from the same stored numbers
    that are summed. The gradient of an example whose norm is not finite is replaced by zeros,
    because 0·inf is NaN.

    Args:
        grads: per-example gradients; the function may overwrite them.
        clip_norm: C, the clipping norm.
        clipping: a key of ``CLIPPINGS``, the factor of an example.

    Privacy: removing or adding one example changes the sum by at most C in L2 norm. The sum itself
    is not private: :func:`add_noise` must follow.
    """
    scales = CLIPPINGS[clipping](grads.norms(), clip_norm)
    dropped = scales == 0
    if _may_contain_true(dropped):
        grads = grads.zero_examples(dropped)
    return grads.weighted_sum(scales)


def _device_normals(size: int, like: Tensor, seed: int) -> Tensor:
    """Draw N(0, 1) entries with the device's own generator; no transfer from the host."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


def _sum_of_two_normals(size: int, like: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw N(0, 1) entries as (x + y)/√2 of two draws of the device's generator.

    One seed of that generator has 63 bits, which an attacker could search exhaustively. The sum
    has two independent seeds, 126 bits.
    """
    first, second = (
        _device_normals(size, like, int(seed)) for seed in rng.integers(1 << 63, size=2)
    )
    return first.add_(second).mul_(math.sqrt(0.5))


def _standard_normals(size: int, like: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw N(0, 1) entries of ``like``'s type on its device.

    On a CPU they come from ``rng`` in float64. On a GPU they come from the GPU's generator, with
    two new seeds of 63 bits from ``rng`` for every release.
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
    """Add Gaussian noise N(0, noise_std²) to every entry of the clipped sums and divide by q·n.

    Args:
        sums: clipped sum per tensor, not modified; zeros for an empty batch, whose result is
            noise alone.
        noise_std: z·C, noise multiplier times clipping norm. Limit: 0 adds no noise.
        expected_batch: q·n, a constant of the run, never the realised batch size.
        rng: random generator of the noise; its state must be secret if the result shall be
            private.

    Privacy: with ``noise_std`` = z·C and sums from :func:`clipped_sum`, one release of the
    Gaussian mechanism with noise multiplier z. The caller counts it.
    """
    totals = list(sums.values())
    sizes = [total.numel() for total in totals]
    noise = torch.split(_standard_normals(sum(sizes), totals[0], rng), sizes)
    shaped = [part.view(total.shape) for part, total in zip(noise, totals, strict=True)]
    noised = torch._foreach_add(totals, shaped, alpha=noise_std)
    torch._foreach_div_(noised, expected_batch)
    return NoisedGrads(dict(zip(sums, noised, strict=True)))
