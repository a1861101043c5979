"""Private steps with one known defect each: an audit must tell them from the real step.

They exist for the audit and its tests only: no method and no config key reaches them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lalora_app.audit.canaries import CanaryBatch
from lalora_app.audit.step_attack import Attack, Observed, Step, StepInputs, real_step
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.gradients import FlatBlock, NoisedGrads, PerExampleGrads, StoredShape
from lalora_app.private_step.mechanism import clip_scales, poisson_batch
from lalora_app.private_step.step import GradientSource, PrivateData, PrivateModel, RandomStreams

WINDOWS = 4  # parts of one example that the clip by window treats as examples of their own
_REPEATED_SEED = 0  # seed of the noise that is drawn again in every step

Clip = Callable[[FlatBlock, float], FlatBlock]


def _with_noise(inputs: StepInputs, factor: float) -> StepInputs:
    """Count one release, and return inputs with ``factor`` times the counted noise."""
    counted = inputs.reservation
    counted.take()
    noise = factor * counted.noise_multiplier
    return replace(inputs, reservation=Reservation(Release(counted.sampling_rate, noise, 1)))


def half_noise(inputs: StepInputs) -> NoisedGrads:
    """Draw half of the noise that the ledger counts."""
    return real_step(_with_noise(inputs, 0.5))


def same_noise(inputs: StepInputs) -> NoisedGrads:
    """Draw the same noise in every step."""
    repeated = RandomStreams(inputs.streams.sampling, seeded(_REPEATED_SEED, "noise"))
    return real_step(replace(inputs, streams=repeated))


def empty_skipped(inputs: StepInputs) -> NoisedGrads:
    """Add no noise to an empty batch."""
    stream = copy.deepcopy(inputs.streams.sampling)  # the real step draws the same batch again
    indices = poisson_batch(len(inputs.data), inputs.reservation.sampling_rate, stream)
    empty = next(iter(inputs.data.micro_batches(indices, 1)), None) is None
    return real_step(_with_noise(inputs, 0.0 if empty else 1.0))


def unnoised_factor() -> Step:
    """Return a step without noise for the waiting factor, which is every second release."""
    released = 0

    def step(inputs: StepInputs) -> NoisedGrads:
        nonlocal released
        released += 1
        return real_step(_with_noise(inputs, float(released % 2)))

    return step


class _ClippedInParts:
    """A model and its gradients, clipped part by part before the private step sees them."""

    def __init__(self, model: PrivateModel[CanaryBatch], clip: Callable[[FlatBlock], FlatBlock]):
        self.losses, self.parameters = model.losses, model.engine.parameters
        self._engine, self._clip = model.engine, clip

    @property
    def engine(self) -> GradientSource:
        """Return this object: it is the source of the gradients too."""
        return self

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return the clipped gradients as one block."""
        dense = self._engine.gradients(losses, examples).dense()
        slots = {name: StoredShape(tuple(part.shape[1:])) for name, part in dense.items()}
        rows = torch.cat([part.flatten(1) for part in dense.values()], dim=1)
        return PerExampleGrads((self._clip(FlatBlock(slots, rows)),))


def _clipped_by(clip: Clip, excess: Callable[[int], float]) -> Step:
    """Return a step that clips by ``clip`` only, with the noise of one clip to C.

    It always clips flat, whatever ``privacy.clipping`` is: automatic clipping would scale again.

    Args:
        clip: the clip of (gradients, C).
        excess: (number of tensors) -> largest norm of a clipped example, in units of C. The flat
            clip of the real step is set to it, so that it changes nothing.
    """

    def step(inputs: StepInputs) -> NoisedGrads:
        largest = excess(len(inputs.model.engine.parameters))
        model = _ClippedInParts(inputs.model, lambda rows: clip(rows, inputs.clip_norm))
        noised = _with_noise(inputs, 1 / largest)  # the noise stays z·C
        clip_norm = largest * inputs.clip_norm
        return real_step(replace(noised, model=model, clip_norm=clip_norm, clipping="flat"))

    return step


def _by_tensor(block: FlatBlock, clip_norm: float) -> FlatBlock:
    """Clip each tensor of an example to C: the whole may be √tensors times as long."""
    sizes = [slot.size for slot in block.shapes.values()]
    parts = torch.split(block.rows, sizes, dim=1)
    scales = [clip_scales(torch.linalg.vector_norm(p, dim=1), clip_norm) for p in parts]
    clipped = [scale[:, None] * part for scale, part in zip(scales, parts, strict=True)]
    return FlatBlock(block.shapes, torch.cat(clipped, dim=1))


def _by_window(block: FlatBlock, clip_norm: float) -> FlatBlock:
    """Clip each window of an example to C; in the worst case all have the same gradient."""
    window = block.rows / WINDOWS
    scales = clip_scales(torch.linalg.vector_norm(window, dim=1), clip_norm)
    return FlatBlock(block.shapes, WINDOWS * scales[:, None] * window)


class _ShuffledEpochs:
    """A dataset whose batches are the parts of a shuffled epoch, whatever indices are sampled.

    Args:
        data: the dataset.
        batches: number of batches per epoch.
        rng: the stream of each epoch's order; None: the order of the records.
    """

    def __init__(
        self, data: PrivateData[CanaryBatch], batches: int, rng: np.random.Generator | None
    ):
        self._data, self._batches, self._rng, self._drawn = data, batches, rng, 0
        self._batch_of: np.ndarray = np.empty(0)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._data)

    def micro_batches(self, indices: np.ndarray, size: int) -> Iterable[CanaryBatch]:
        """Return the next batch of the epoch; the sampled indices are ignored."""
        if self._drawn % self._batches == 0:
            count = len(self)
            order = np.arange(count) if self._rng is None else self._rng.permutation(count)
            self._batch_of = order % self._batches
        own = np.flatnonzero(self._batch_of == self._drawn % self._batches)
        self._drawn += 1
        return self._data.micro_batches(own, size)


def shuffled(*, secret: bool) -> Step:
    """Return a step through shuffled epochs, in the records' own order or in a secret one."""
    epochs: list[_ShuffledEpochs] = []

    def step(inputs: StepInputs) -> NoisedGrads:
        if not epochs:
            # A copy: the real step draws its ignored Poisson batches from the stream itself.
            rng = copy.deepcopy(inputs.streams.sampling) if secret else None
            batches = round(1 / inputs.reservation.sampling_rate)
            epochs.append(_ShuffledEpochs(inputs.data, batches, rng))
        return real_step(replace(inputs, data=epochs[0]))

    return step


def known_order(seen: Observed, rate: float) -> np.ndarray:
    """Score each canary by the releases that a fixed order puts it into, and by no other."""
    releases, canaries = seen.x.shape
    batches = round(1 / rate)
    included = (np.arange(releases)[:, None] - np.arange(canaries)) % batches == 0
    ratios = np.where(included, (2 * seen.x - 1) / (2 * seen.noise**2), 0.0)
    scores: np.ndarray = ratios.sum(axis=0)
    return scores


@dataclass(frozen=True)
class Broken:
    """A private step with a known defect.

    Attributes:
        defect: the defect in a few words.
        make: the maker of the step; a step may have state, so every run makes one.
        single_canary: whether the defect shows only where the canary is the only record.
        attacks: further attacks against this step.
    """

    defect: str
    make: Callable[[], Step]
    single_canary: bool = False
    attacks: Mapping[str, Attack] = field(default_factory=dict)


BROKEN = {
    "per-window-clip": Broken(
        f"clips each of {WINDOWS} windows of an example to C",
        lambda: _clipped_by(_by_window, lambda tensors: float(WINDOWS)),
    ),
    "per-layer-clip": Broken(
        "clips each tensor to C, and adds the noise of one clip",
        lambda: _clipped_by(_by_tensor, lambda tensors: float(tensors**0.5)),
    ),
    "half-noise": Broken("draws half of the noise that is counted", lambda: half_noise),
    "same-noise": Broken("draws the same noise in every step", lambda: same_noise),
    "empty-batches-skipped": Broken(
        "adds no noise to an empty batch", lambda: empty_skipped, single_canary=True
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
        "adds no noise in the steps of the factor that waits for its round", unnoised_factor
    ),
}
