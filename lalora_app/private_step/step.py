"""One private step: count the release, sample a batch, clip per example, sum, add noise.

Gradients of private examples become a result that may leave the client in two functions only:
:func:`private_gradient` adds the whole noise, :func:`private_integers` adds a client's share of the
noise of a sum. They call ``mechanism.py`` for sampling, clipping and noise. The privacy budget was
reserved in the ledger before.
"""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step.gradients import NoisedGrads, PerExampleGrads
from lalora_app.private_step.mechanism import add_noise, clipped_sum, poisson_batch
from lalora_app.shared_noise.lattice import Lattice, to_lattice
from lalora_app.shared_noise.seeded import Integers, share


class LabelledBatch(Protocol):
    """A micro-batch: one label (or label sequence) per example."""

    @property
    def labels(self) -> Sized:
        """Return the labels; their length is the number of examples."""


B_co = TypeVar("B_co", bound=LabelledBatch, covariant=True)
B_contra = TypeVar("B_contra", bound=LabelledBatch, contravariant=True)
B = TypeVar("B", bound=LabelledBatch)


class PrivateData(Protocol[B_co]):
    """The encoded training examples of one client."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def micro_batches(self, indices: np.ndarray, size: int) -> Iterable[B_co]:
        """Return the examples of ``indices`` in batches of at most ``size``."""


class GradientSource(Protocol):
    """The part of :class:`~lalora_app.private_step.engine.Engine` that a step calls."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the trainable tensors by wire name; a step takes those that require gradients."""

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient per example for every active tensor."""


class PrivateModel(Protocol[B_contra]):
    """A model that computes one loss per example and the gradients of these losses."""

    @property
    def engine(self) -> GradientSource:
        """Return the source of the per-example gradients."""

    def losses(self, batch: B_contra) -> Tensor:
        """Return (examples,): one loss per example, independent of the other examples."""


@dataclass(frozen=True)
class RandomStreams:
    """The two random generators of one client in one round; secret in a private run.

    Attributes:
        sampling: generator of the Poisson batches.
        noise: generator of the Gaussian noise.
    """

    sampling: np.random.Generator
    noise: np.random.Generator


def _clipped_batch_sum(
    model: PrivateModel[B],
    data: PrivateData[B],
    indices: np.ndarray,
    clip_norm: float,
    micro_batch: int,
    clipping: str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the clipped sum per tensor over a batch; zeros for an empty batch."""
    sums: dict[str, Tensor] = {}
    for batch in data.micro_batches(indices, micro_batch):
        grads = model.engine.gradients(partial(model.losses, batch), len(batch.labels))
        scaled = clipped_sum(grads, clip_norm, clipping)
        totals = {name: total.to(dtype or total.dtype) for name, total in scaled.items()}
        if sums:
            torch._foreach_add_(list(sums.values()), [totals[name] for name in sums])
        else:
            sums = totals
    active = [(n, p) for n, p in model.engine.parameters.items() if p.requires_grad]
    return {n: sums[n] if sums else torch.zeros_like(p, dtype=dtype) for n, p in active}


def private_integers(
    model: PrivateModel[B],
    data: PrivateData[B],
    *,
    reservation: Reservation,
    lattice: Lattice,
    seeds: Sequence[bytes],
    micro_batch: int,
    sampling: np.random.Generator,
    clipping: str = "flat",
) -> Integers:
    """Compute a client's part of a private sum: (d,) integers of its active tensors, by name.

    round(Σ_i min(1, C/‖g_i‖)·g_i / γ) + the client's share of the noise, with i over a Poisson
    batch of rate q, and the sum over micro-batches in float64.

    Args:
        model: the model; the tensors to train in this step are active (require gradients).
        data: the client's examples.
        reservation: the reserved releases, with sampling rate q and noise multiplier z; one release
            is taken from it.
        lattice: the run's integers, with unit γ, clip norm C and the same z and q.
        seeds: the secret seeds of this upload's noise, used for no other.
        micro_batch: number of examples per forward pass.
        sampling: the random generator of the batch.
        clipping: ``privacy.clipping``.

    Raises:
        BudgetError: if the reservation has no release left; nothing is drawn in this case.
        ValueError: if the lattice has another rate or noise than the ledger, or another size.

    Limit: without noise (z = 0) the share is zero.

    Privacy: the sum over all clients is one release with noise multiplier z. This part alone has
    only a share of the noise: it must leave under masks.
    """
    run = lattice.constants
    if (run.sampling_rate, run.noise_multiplier) != (
        reservation.sampling_rate,
        reservation.noise_multiplier,
    ):
        raise ValueError("the lattice must have the sampling rate and the noise of the ledger")
    reservation.take()
    indices = poisson_batch(len(data), run.sampling_rate, sampling)
    wide = torch.float64
    sums = _clipped_batch_sum(model, data, indices, run.clip_norm, micro_batch, clipping, wide)
    flat = torch.cat([sums[name].flatten() for name in sorted(sums)]).cpu().numpy()
    noise = share(seeds, lattice)
    if flat.size != noise.size:
        raise ValueError(f"the lattice must have {flat.size} entries, not {noise.size}")
    return to_lattice(flat, lattice.unit) + noise


def noise_std_of(reservation: Reservation, clip_norm: float) -> float:
    """Return z·C, the standard deviation of the noise in a sum; 0 for z = 0, even at C = inf."""
    z = reservation.noise_multiplier
    return z * clip_norm if z > 0 else 0.0


def private_gradient(
    model: PrivateModel[B],
    data: PrivateData[B],
    *,
    reservation: Reservation,
    clip_norm: float,
    micro_batch: int,
    streams: RandomStreams,
    clipping: str = "flat",
    sum_dtype: torch.dtype | None = None,
    expected_batch: float | None = None,
) -> NoisedGrads:
    """Compute one private gradient: the noised mean gradient of the model's active tensors.

    (Σ_i min(1, C/‖g_i‖)·g_i + z·C·N(0, I)) / (q·n), with i over a Poisson batch of rate q
    (arXiv:1607.00133, Alg. 1); with automatic clipping C/(‖g_i‖ + γ) in place of the minimum.

    Args:
        model: the model; the tensors to train in this step are active (require gradients).
        data: the client's n examples.
        reservation: the reserved releases, with sampling rate q and noise multiplier z; one release
            is taken from it.
        clip_norm: C, the bound of an example's gradient norm over all active tensors together.
        micro_batch: number of examples per forward pass. Noise is added once per batch, not per
            micro-batch.
        streams: the random generators of sampling and noise.
        clipping: ``privacy.clipping``.
        sum_dtype: the number type of the sum over micro-batches and of the noise; None: that of
            the gradients. Batches of many thousand examples need float64.
        expected_batch: the divisor of the noised sum; None: q·n.

    Raises:
        BudgetError: if the reservation has no release left; nothing is drawn in this case.

    Privacy: one release of the Poisson-subsampled Gaussian mechanism with noise multiplier z. An
    empty batch is released as well, as noise alone.
    """
    reservation.take()
    q = reservation.sampling_rate
    indices = poisson_batch(len(data), q, streams.sampling)
    sums = _clipped_batch_sum(model, data, indices, clip_norm, micro_batch, clipping, sum_dtype)
    noise_std = noise_std_of(reservation, clip_norm)
    expected = q * len(data) if expected_batch is None else expected_batch
    return add_noise(sums, noise_std=noise_std, expected_batch=expected, rng=streams.noise)
