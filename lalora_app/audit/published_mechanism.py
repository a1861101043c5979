"""One step of the published LA-LoRA mechanism (arXiv:2602.19926), restated from its authors' code.

The gradient of the whole batch is clipped, tensor by tensor, to the smaller of a constant and the
median of this batch's own tensor norms; the noise is a fraction of that threshold over the batch
size. No example is clipped, and the threshold follows from the private batch. It exists for the
audit only and is not a method of the app. The bound on ε is :func:`estimators.two_sided`.
"""

from dataclasses import dataclass

import numpy as np

from lalora_app.audit.estimators import AttackErrors, two_sided
from lalora_app.audit.findings import AuditRow
from lalora_app.privacy.randomness import seeded

_CHUNK = 2000  # trials at a time


@dataclass(frozen=True)
class Setting:
    """The authors' vision setting, and the canary's gradient.

    Attributes:
        batch: number of examples per step.
        tensors: number of tensors that a step trains; 24 adapted layers in Swin-T.
        entries: number of entries per tensor; the attack needs no more.
        noise: the authors' ``dp_sigma``.
        cap: upper limit of the clip threshold.
        relative_norm: norm of the canary's gradient relative to the other examples' norms.
    """

    batch: int = 16
    tensors: int = 24
    entries: int = 8
    noise: float = 0.2
    cap: float = 0.4
    relative_norm: float = 1.0


def clipped_mean(gradients: np.ndarray, setting: Setting) -> tuple[np.ndarray, float]:
    """Return the release before noise, (tensors, entries), and the noise's standard deviation.

    Args:
        gradients: (examples, tensors, entries), one gradient per example.
        setting: the setting of the step.
    """
    mean = gradients.sum(axis=0) / setting.batch
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    threshold = min(float(np.median(norms)), setting.cap)
    return mean * np.minimum(1.0, threshold / norms), setting.noise * threshold / setting.batch


def _batches(setting: Setting, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch without and with the canary; other examples' joint norms are about 1."""
    shape = (setting.batch, setting.tensors, setting.entries)
    gradients = rng.standard_normal(shape) / np.sqrt(setting.tensors * setting.entries)
    without, including = gradients.copy(), gradients.copy()
    without[0] = 0.0
    including[0] *= setting.relative_norm
    return without, including


@dataclass(frozen=True)
class StepErrors:
    """The success of a membership attack on one step of the published mechanism.

    Attributes:
        errors: errors of the likelihood ratio test over independent repetitions of the step.
        distance: distance of the two releases before noise, in standard deviations of the noise.
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


def attacked(setting: Setting, trials: int, seed: int) -> StepErrors:
    """Test steps with the canary against steps without it, ``trials`` times each."""
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
    return StepErrors(
        AttackErrors(wrong[0], trials, wrong[1], trials), gap / max(s for _, s in sides)
    )


def rows(trials: int, seed: int, delta: float, confidence: float) -> list[AuditRow]:
    """Return the outcome of attacks on one step, with a typical and with a large gradient.

    Args:
        trials: steps with the example, and as many without it.
        seed: seed of the gradients and of the noise.
        delta: δ of the bounds.
        confidence: confidence of each bound.
    """
    found = []
    for name, norm in (("one step, typical gradient", 1.0), ("one step, large gradient", 100.0)):
        seen = attacked(Setting(relative_norm=norm), trials, seed)
        errors = seen.errors.false_alarms + seen.errors.misses
        evidence = f"{errors} errors in {2 * trials} trials, "
        evidence += f"{seen.distance:.0f} deviations of the noise apart"
        found.append(AuditRow(name, seen.bound(delta, confidence), None, evidence))
    return found
