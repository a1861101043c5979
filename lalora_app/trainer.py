"""One client's round: private steps on the active factors, in the order of the schedule."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter import Adapter, active_names, kind
from lalora_app.backbone import Backbone
from lalora_app.config import Train
from lalora_app.encoding import Encoded
from lalora_app.methods import Method
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.mechanism import add_noise, clipped_sum, poisson_batch
from lalora_app.privacy.types import NoisedGrads


@dataclass(frozen=True)
class Streams:
    """The two secret random streams of a client's round."""

    sampling: np.random.Generator
    noise: np.random.Generator


def make_optimizer(backbone: Backbone, train: Train, t: int) -> torch.optim.Optimizer:
    """Return the round's optimiser: one group a kind of tensor, learning rates decayed by round.

    A tensor without a gradient is left bit-identical, its moments kept (torch skips it).
    """
    decay = train.lr_decay ** (t - 1)
    rates = {"A": train.lr_a * decay, "B": train.lr_b * decay, "head": train.lr_head * decay}
    named = backbone.engine.parameters.items()
    groups = [
        {"params": [p for name, p in named if kind(name) == which], "lr": rate}
        for which, rate in rates.items()
    ]
    weight_decay = train.weight_decay
    # foreach: a few operations for all tensors together
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, foreach=True)
    momentum = train.momentum
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, foreach=True)


def _summed(
    backbone: Backbone, data: Encoded, indices: np.ndarray, clip_norm: float, micro_batch: int
) -> dict[str, Tensor]:
    """Return the clipped sum over a batch of any size: zeros if it is empty."""
    sums: dict[str, Tensor] = {}
    for batch in data.micro_batches(indices, micro_batch):
        grads = backbone.engine.gradients(partial(backbone.losses, batch), len(batch.labels))
        totals = clipped_sum(grads, clip_norm)
        if sums:
            torch._foreach_add_(list(sums.values()), [totals[name] for name in sums])
        else:
            sums = totals
    active = [(n, p) for n, p in backbone.engine.parameters.items() if p.requires_grad]
    return {name: sums[name] if sums else torch.zeros_like(p) for name, p in active}


def private_gradient(
    backbone: Backbone,
    data: Encoded,
    *,
    reservation: Reservation,
    clip_norm: float,
    micro_batch: int,
    streams: Streams,
) -> NoisedGrads:
    """Draw one counted release: the noised mean gradient of the engine's active tensors.

    Args:
        backbone: with the tensors of this step made active.
        data: the client's examples.
        reservation: gives q and the noise multiplier, and counts the release.
        clip_norm: C, of each example's joint gradient.
        micro_batch: examples a forward; noise is added once, to the whole batch's sum.
        streams: sampling and noise.

    Raises:
        BudgetError: if the reservation is used up; nothing is drawn then.
    """
    reservation.take()
    q = reservation.sampling_rate
    indices = poisson_batch(len(data), q, streams.sampling)
    sums = _summed(backbone, data, indices, clip_norm, micro_batch)
    # C may be inf only where the noise multiplier is 0, and inf·0 is NaN.
    z = reservation.noise_multiplier
    noise_std = z * clip_norm if z > 0 else 0.0
    expected = q * len(data)
    return add_noise(sums, noise_std=noise_std, expected_batch=expected, rng=streams.noise)


def apply(backbone: Backbone, optimizer: torch.optim.Optimizer, gradients: NoisedGrads) -> None:
    """Take one optimiser step on the tensors that have a gradient, and on no other."""
    for name, parameter in backbone.engine.parameters.items():
        parameter.grad = gradients.get(name)
    optimizer.step()


def run_round(
    backbone: Backbone,
    data: Encoded,
    start: Adapter,
    *,
    method: Method,
    t: int,
    train: Train,
    clip_norm: float,
    reservation: Reservation,
    streams: Streams,
) -> Adapter:
    """Run round ``t``'s local steps from ``start`` and return the client's whole adapter.

    Privacy: every step is one release of the reservation; the result is made of ``start`` and
    of noised gradients only, so all of it may leave the client.
    """
    backbone.load(start)
    optimizer = make_optimizer(backbone, train, t)
    for k in range(train.local_steps):
        backbone.engine.activate(active_names(start, method.trains(t, k)))
        noised = private_gradient(
            backbone,
            data,
            reservation=reservation,
            clip_norm=clip_norm,
            micro_batch=train.micro_batch,
            streams=streams,
        )
        apply(backbone, optimizer, method.postprocess(noised))
    return backbone.adapter()
