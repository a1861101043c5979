"""Private steps that are known to be broken, each by one change to the real one.

They exist for the audit alone: no method and no config key reaches them.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lalora_app.audit.step_attack import Attack, Observed, Step
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.gradients import FlatBlock, NoisedGrads, PerExampleGrads
from lalora_app.private_step.mechanism import clip_scales, poisson_batch
from lalora_app.private_step.step import RandomStreams, private_gradient

WINDOWS = 4  # of an example, for the clip by window
_FIRST_DRAW = 0  # seed of the noise that is used again and again


def _with_noise(reservation: Reservation, factor: float) -> Reservation:
    """Count a release, and return one whose noise is another than was counted."""
    reservation.take()
    noise = factor * reservation.noise_multiplier
    return Reservation(Release(reservation.sampling_rate, noise, 1))


def half_noise(backbone: Any, data: Any, *, reservation: Reservation, **rest: Any) -> NoisedGrads:
    """Draw half of the noise that the ledger counts."""
    return private_gradient(backbone, data, reservation=_with_noise(reservation, 0.5), **rest)


def same_noise(backbone: Any, data: Any, *, streams: RandomStreams, **rest: Any) -> NoisedGrads:
    """Draw the same noise in every step."""
    again = RandomStreams(streams.sampling, seeded(_FIRST_DRAW, "noise"))
    return private_gradient(backbone, data, streams=again, **rest)


def empty_skipped(
    backbone: Any, data: Any, *, reservation: Reservation, streams: RandomStreams, **rest: Any
) -> NoisedGrads:
    """Skip the noise where no example came: a record without content is none."""
    ahead = copy.deepcopy(streams.sampling)
    drawn = poisson_batch(len(data), reservation.sampling_rate, ahead)
    empty = next(data.micro_batches(drawn, 1), None) is None
    taken = _with_noise(reservation, 0.0 if empty else 1.0)
    return private_gradient(backbone, data, reservation=taken, streams=streams, **rest)


def unnoised_factor() -> Step:
    """Return a step that adds no noise for the factor that waits: every second one."""
    drawn = 0

    def step(backbone: Any, data: Any, *, reservation: Reservation, **rest: Any) -> NoisedGrads:
        nonlocal drawn
        drawn += 1
        taken = _with_noise(reservation, float(drawn % 2))
        return private_gradient(backbone, data, reservation=taken, **rest)

    return step


class _Loosened:
    """A backbone whose gradients come clipped in parts: to ``parts`` times C, or √parts."""

    def __init__(self, backbone: Any, clip: Callable[[FlatBlock], FlatBlock]):
        self.losses, self.engine = backbone.losses, self
        self.parameters = backbone.engine.parameters
        self._inner, self._clip = backbone.engine, clip

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        (block,) = self._inner.gradients(losses, examples).blocks
        return PerExampleGrads((self._clip(block),))


def _in_parts(
    clip: Callable[[FlatBlock, float], FlatBlock], excess: Callable[[Any], float]
) -> Step:
    """Return a step that clips by ``clip``, whose result may be ``excess`` times C long.

    The flat clip of the real step is set too high to bite, and the noise stays z·C.
    """

    def step(
        backbone: Any, data: Any, *, reservation: Reservation, clip_norm: float, **rest: Any
    ) -> NoisedGrads:
        loose = excess(backbone.engine)
        taken = _with_noise(reservation, 1 / loose)
        parts = _Loosened(backbone, lambda rows: clip(rows, clip_norm))
        wide = loose * clip_norm
        return private_gradient(cast(Any, parts), data, reservation=taken, clip_norm=wide, **rest)

    return step


def _by_tensor(block: FlatBlock, clip_norm: float) -> FlatBlock:
    sizes = [shape.size for shape in block.shapes.values()]
    parts = torch.split(block.rows, sizes, dim=1)
    scales = [clip_scales(torch.linalg.vector_norm(p, dim=1), clip_norm) for p in parts]
    clipped = [scale[:, None] * part for scale, part in zip(scales, parts, strict=True)]
    return FlatBlock(block.shapes, torch.cat(clipped, dim=1))


def _by_window(block: FlatBlock, clip_norm: float) -> FlatBlock:
    """Clip each of an example's windows; here all of them pull the same way."""
    window = block.rows / WINDOWS
    scales = clip_scales(torch.linalg.vector_norm(window, dim=1), clip_norm)
    return FlatBlock(block.shapes, WINDOWS * scales[:, None] * window)


class _Order:
    """In place of a random stream: says which records are in the batch of a shuffled epoch."""

    def __init__(self, rate: float, rng: np.random.Generator | None):
        self._epoch, self._rng, self._drawn = round(1 / rate), rng, 0
        self._turns: np.ndarray = np.empty(0)

    def random(self, size: int) -> np.ndarray:
        """Return 0 for the records whose turn it is, and 1 for the others."""
        if self._drawn % self._epoch == 0:
            everyone = np.arange(size)
            order = everyone if self._rng is None else self._rng.permutation(size)
            self._turns = order % self._epoch
        turn = self._drawn % self._epoch
        self._drawn += 1
        return np.where(self._turns == turn, 0.0, 1.0)


def shuffled(*, secret: bool) -> Step:
    """Return a step that goes through shuffled epochs; the order is fixed, or drawn in secret."""
    orders: list[_Order] = []

    def step(
        backbone: Any, data: Any, *, reservation: Reservation, streams: RandomStreams, **rest: Any
    ) -> NoisedGrads:
        rng = streams.sampling if secret else None
        orders.extend([_Order(reservation.sampling_rate, rng)] * (not orders))
        turns = RandomStreams(cast(Any, orders[0]), streams.noise)
        return private_gradient(backbone, data, reservation=reservation, streams=turns, **rest)

    return step


def known_order(seen: Observed, rate: float) -> np.ndarray:
    """Score by the releases alone that a fixed order puts each canary into."""
    releases, canaries = seen.x.shape
    epoch = round(1 / rate)
    turns = (np.arange(releases)[:, None] - np.arange(canaries)) % epoch == 0
    certain = np.where(turns, (2 * seen.x - 1) / (2 * seen.noise**2), 0.0)
    scores: np.ndarray = certain.sum(axis=0)
    return scores


@dataclass(frozen=True)
class Broken:
    """A private step that does not keep its promise.

    Attributes:
        said: what is wrong.
        make: returns the step, anew for every run.
        alone: whether it shows where the canary is the only record.
        attacks: what an attacker of this step tries besides.
    """

    said: str
    make: Callable[[], Step]
    alone: bool = False
    attacks: Mapping[str, Attack] = field(default_factory=dict)


BROKEN = {
    "per-window-clip": Broken(
        f"clips each of {WINDOWS} windows of an example to C",
        lambda: _in_parts(_by_window, lambda engine: float(WINDOWS)),
    ),
    "per-layer-clip": Broken(
        "clips each tensor to C, and adds the noise of one clip",
        lambda: _in_parts(_by_tensor, lambda engine: float(len(engine.parameters) ** 0.5)),
    ),
    "half-noise": Broken("draws half of the noise that is counted", lambda: half_noise),
    "same-noise": Broken("draws the same noise in every step", lambda: same_noise),
    "empty-batches-skipped": Broken(
        "adds no noise where the batch is empty", lambda: empty_skipped, alone=True
    ),
    "shuffled-batches": Broken(
        "goes through the data in one fixed order, and counts Poisson batches",
        lambda: shuffled(secret=False),
        attacks={"known order": known_order},
    ),
    "shuffled-in-secret": Broken(
        "goes through the data in a secret order, and counts Poisson batches",
        lambda: shuffled(secret=True),
    ),
    "unnoised-factor": Broken(
        "adds no noise in the steps of the factor that waits for its turn", unnoised_factor
    ),
}
