"""The private step: sample a batch, clip every example's gradient, sum, add noise, count it.

This is the only place where gradients of private examples become a releasable quantity. Sampling
and noise are drawn in ``mechanism.py``; the reservation comes from the ledger.
"""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step.gradients import NoisedGrads, PerExampleGrads
from lalora_app.private_step.mechanism import add_noise, clipped_sum, poisson_batch


class LabelledBatch(Protocol):
    """A micro-batch: one label (or label sequence) per example."""

    @property
    def labels(self) -> Sized:
        """Return the labels; their length is the number of examples."""


B_co = TypeVar("B_co", bound=LabelledBatch, covariant=True)
B_contra = TypeVar("B_contra", bound=LabelledBatch, contravariant=True)
B = TypeVar("B", bound=LabelledBatch)


class PrivateData(Protocol[B_co]):
    """A client's encoded examples."""

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
    """A model that gives one loss per example, and their gradients."""

    @property
    def engine(self) -> GradientSource:
        """Return the source of the per-example gradients."""

    def losses(self, batch: B_contra) -> Tensor:
        """Return (examples,): the loss of each example on its own."""


@dataclass(frozen=True)
class RandomStreams:
    """The two secret random streams of a client's round."""

    sampling: np.random.Generator
    noise: np.random.Generator


def _clipped_batch_sum(
    model: PrivateModel[B],
    data: PrivateData[B],
    indices: np.ndarray,
    clip_norm: float,
    micro_batch: int,
) -> dict[str, Tensor]:
    """Return the clipped sum over a batch of any size: zeros if it is empty."""
    sums: dict[str, Tensor] = {}
    for batch in data.micro_batches(indices, micro_batch):
        grads = model.engine.gradients(partial(model.losses, batch), len(batch.labels))
        totals = clipped_sum(grads, clip_norm)
        if sums:
            torch._foreach_add_(list(sums.values()), [totals[name] for name in sums])
        else:
            sums = totals
    active = [(n, p) for n, p in model.engine.parameters.items() if p.requires_grad]
    return {name: sums[name] if sums else torch.zeros_like(p) for name, p in active}


def noise_std_of(reservation: Reservation, clip_norm: float) -> float:
    """Return z·C, the standard deviation of the noise in a sum; 0 if z is 0, also for C = inf."""
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
) -> NoisedGrads:
    """Draw one counted release: the noised mean gradient of the model's active tensors.

    (1/(q·n)) · (Σ_i min(1, C/‖g_i‖)·g_i + z·C·N(0, I)), over a Poisson batch of rate q.

    Args:
        model: the model, with the tensors of this step made active.
        data: the client's n examples.
        reservation: sampling rate q and noise multiplier z; counts the release.
        clip_norm: C, the bound of each example's gradient over all active tensors together.
        micro_batch: examples per forward pass; noise is added once, to the sum of the whole batch.
        streams: random streams of the sampling and of the noise.

    Raises:
        BudgetError: if the reservation is used up; nothing is drawn then.

    Privacy: one release of the Poisson-subsampled Gaussian mechanism with noise multiplier z. An
    empty batch is released too, as noise alone.
    """
    reservation.take()
    q = reservation.sampling_rate
    indices = poisson_batch(len(data), q, streams.sampling)
    sums = _clipped_batch_sum(model, data, indices, clip_norm, micro_batch)
    noise_std = noise_std_of(reservation, clip_norm)
    expected = q * len(data)
    return add_noise(sums, noise_std=noise_std, expected_batch=expected, rng=streams.noise)
