"""The published LA-LoRA mechanism, as its authors' code has it: it lives here, and is no method.

The gradient of the whole batch is clipped, tensor by tensor, to the smaller of a constant and the
median of this batch's own tensor norms; the noise is a fraction of that threshold over the batch
size. No example is clipped, and the threshold follows from the private batch.
"""

from dataclasses import dataclass

import numpy as np

from lalora_app.audit.estimators import AttackErrors, two_sided
from lalora_app.privacy.randomness import seeded

_CHUNK = 2000  # trials at a time


@dataclass(frozen=True)
class Setting:
    """The authors' vision setting, and one gradient in it.

    Attributes:
        batch: examples a step.
        tensors: that train in a step: Swin-T's 24 adapted layers.
        entries: of each tensor here; the attack needs no more.
        noise: ``dp_sigma``.
        cap: the constant that the median is cut at.
        loudness: norm of the canary's gradient over that of the other examples.
    """

    batch: int = 16
    tensors: int = 24
    entries: int = 8
    noise: float = 0.2
    cap: float = 0.4
    loudness: float = 1.0


def clipped_mean(gradients: np.ndarray, setting: Setting) -> tuple[np.ndarray, float]:
    """Return what is released before noise, (tensors, entries), and the noise's deviation.

    Args:
        gradients: (examples, tensors, entries).
        setting: of the run.
    """
    mean = gradients.sum(axis=0) / setting.batch
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    threshold = min(float(np.median(norms)), setting.cap)
    return mean * np.minimum(1.0, threshold / norms), setting.noise * threshold / setting.batch


def _batches(setting: Setting, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch without and with the canary; an example's joint gradient norm is about 1."""
    shape = (setting.batch, setting.tensors, setting.entries)
    gradients = rng.standard_normal(shape) / np.sqrt(setting.tensors * setting.entries)
    without, loud = gradients.copy(), gradients.copy()
    without[0] = 0.0
    loud[0] *= setting.loudness
    return without, loud


@dataclass(frozen=True)
class Attacked:
    """What one step of the published mechanism gives away.

    Attributes:
        errors: of the likelihood ratio test over independent repetitions of one step.
        distance: between the two releases before noise, in deviations of the noise.
    """

    errors: AttackErrors
    distance: float

    def bound(self, delta: float, confidence: float) -> float:
        """Return the lower bound on ε of a single step."""
        return two_sided(self.errors, delta, confidence)


def _log_density(x: np.ndarray, centre: np.ndarray, deviation: float) -> np.ndarray:
    squares: np.ndarray = ((x - centre) ** 2).sum(axis=(1, 2)) / (2 * deviation**2)
    density: np.ndarray = -squares - centre.size * np.log(deviation)
    return density


def attacked(setting: Setting, trials: int, seed: int) -> Attacked:
    """Tell steps with one example from steps without it, ``trials`` times each."""
    rng = seeded(seed, "published")
    sides = [clipped_mean(batch, setting) for batch in _batches(setting, rng)]
    wrong = []
    for truth, (centre, deviation) in enumerate(sides):
        count = 0
        for start in range(0, trials, _CHUNK):
            shape = (min(_CHUNK, trials - start), *centre.shape)
            seen = centre + deviation * rng.standard_normal(shape)
            out, inside = (_log_density(seen, *side) for side in sides)
            count += int(((inside > out) != bool(truth)).sum())
        wrong.append(count)
    gap = float(np.linalg.norm(sides[1][0] - sides[0][0]))
    return Attacked(
        AttackErrors(wrong[0], trials, wrong[1], trials), gap / max(s for _, s in sides)
    )
