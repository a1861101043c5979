"""Lower bounds on ε from an attack's hits and misses, at a stated confidence.

Two of the bounds hold for every (ε, δ)-DP mechanism (``one_run``, ``two_sided``). Two more are
larger but assume the shape of its trade-off curve (``gaussian``, ``subsampled``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from lalora_app.privacy.accounting import Release, epsilon, total_variation

_LARGEST = 64.0  # largest bound on ε; no number of canaries shows more
_TOLERANCE = 1e-4  # largest distance of a bound below the ε that is searched
_MOST_NOISE = 2.0**10  # noise multiplier with ε = 0 in every printed digit
_LEAST_NOISE = 2.0**-3
_POINTS = 60  # largest number of points of a ROC in a figure


@dataclass(frozen=True)
class Guesses:
    """A membership game: ``correct`` of ``made`` guesses, about some of ``canaries`` canaries."""

    correct: int
    made: int
    canaries: int


@dataclass(frozen=True)
class AttackErrors:
    """Errors of a test of "in" against "out".

    Attributes:
        false_alarms: number of guesses "in" about canaries that were out.
        outs: number of canaries that were out.
        misses: number of guesses "out" about canaries that were in.
        ins: number of canaries that were in.
    """

    false_alarms: int
    outs: int
    misses: int
    ins: int


def roc(scores: np.ndarray, members: np.ndarray) -> list[tuple[float, float]]:
    """Return (false alarm rate, hit rate) of "in at this score and above", at most _POINTS.

    The false alarm rates are spread evenly on a logarithmic axis, from one false alarm upwards.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.diff(scores[order]) != 0, True)  # equal scores share a threshold
    alarms = np.cumsum(~members[order])[ends] / (~members).sum()
    hits = np.cumsum(members[order])[ends] / members.sum()
    levels = np.geomspace(1 / (~members).sum(), 1.0, _POINTS)
    last = np.unique(np.searchsorted(alarms, levels * (1 + 1e-9), side="right") - 1)
    return [(float(alarms[i]), float(hits[i])) for i in last if i >= 0]


def _one_run_p_value(guesses: Guesses, epsilon_: float, delta: float) -> float:
    """Return the largest chance of so many hits under (ε, δ)-DP: Theorem 5.2 of 2305.08846."""
    chance, right = 1 / (1 + math.exp(-epsilon_)), guesses.correct
    plain = float(stats.binom.sf(right - 1, guesses.made, chance))
    if delta == 0 or right == 0:
        return plain
    fewer = np.arange(1, right + 1)
    mass = np.cumsum(stats.binom.pmf(right - fewer, guesses.made, chance))
    slope = float(np.max(mass / fewer))  # mass: P(right - i <= hits < right)
    return min(1.0, plain + 2 * guesses.canaries * delta * slope)


def _largest_rejected(p_value: Callable[[float], float], level: float) -> float:
    """Return the largest ε whose p-value is below ``level``; 0 if none is."""
    if p_value(0.0) >= level:
        return 0.0
    if p_value(_LARGEST) < level:
        return _LARGEST
    low, high = 0.0, _LARGEST
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) < level else (low, middle)
    return low


def one_run(guesses: Guesses, delta: float, confidence: float) -> float:
    """Return ε's lower bound from many canaries in one run (Steinke et al., arXiv:2305.08846).

    It assumes nothing but (ε, δ)-DP and fair, independent coins: the canaries may influence each
    other. Limit: guesses no better than chance give 0.

    Args:
        guesses: the attack's guesses.
        delta: δ of the promise.
        confidence: confidence of the bound.
    """
    return _largest_rejected(lambda e: _one_run_p_value(guesses, e, delta), 1 - confidence)


def at_most(events: int, trials: int, confidence: float) -> float:
    """Return Clopper and Pearson's one-sided upper bound on the chance of an event."""
    if events == trials:
        return 1.0
    return float(stats.beta.ppf(confidence, events + 1, trials - events))


def _rates(errors: AttackErrors, confidence: float) -> tuple[float, float]:
    """Return upper bounds on both error rates; both hold together at ``confidence``."""
    each = (1 + confidence) / 2
    return (
        at_most(errors.false_alarms, errors.outs, each),
        at_most(errors.misses, errors.ins, each),
    )


def two_sided(errors: AttackErrors, delta: float, confidence: float) -> float:
    """Return ε's lower bound from the error rates of a test on independent trials.

    Under (ε, δ)-DP every test has ``1 - β <= e^ε α + δ`` and ``1 - α <= e^ε β + δ`` (Kairouz et
    al., arXiv:1311.0776). The trials must be independent of each other.
    """
    alarm, miss = _rates(errors, confidence)
    ratios = [(1 - miss - delta) / alarm, (1 - alarm - delta) / miss]
    return max(0.0, *(math.log(ratio) if ratio > 0 else 0.0 for ratio in ratios))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε at δ of μ-Gaussian DP (Balle and Wang, arXiv:1805.06530). Limit: μ <= 0 gives 0."""
    if mu <= 0:
        return 0.0

    def excess(eps: float) -> float:
        upper = stats.norm.cdf(mu / 2 - eps / mu)
        lower = math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))
        return float(upper - lower - delta)

    return float(brentq(excess, 0.0, mu * mu + 10 * mu)) if excess(0.0) > 0 else 0.0


def gaussian(errors: AttackErrors, delta: float, confidence: float) -> float:
    """Return ε's lower bound if the mechanism is Gaussian (Nasr et al., arXiv:2302.07956).

    Assumes the trade-off curve of μ-GDP, ``Φ⁻¹(1 - α) - Φ⁻¹(β) = μ``, and independent trials.
    """
    alarm, miss = _rates(errors, confidence)
    return gaussian_epsilon(float(stats.norm.ppf(1 - alarm) - stats.norm.ppf(miss)), delta)


def counted_p_value(errors: AttackErrors, releases: Sequence[Release]) -> float:
    """Return the largest chance of so few errors if the mechanism is the counted one.

    Under the composition of ``releases`` a guess about a fair coin is right with a chance of at
    most ``(1 + TV)/2``. Assumes independent trials.
    """
    trials = errors.outs + errors.ins
    right = trials - errors.false_alarms - errors.misses
    return float(stats.binom.sf(right - 1, trials, (1 + total_variation(releases)) / 2))


def _noise_behind(advantage: float, sampling_rate: float, steps: int) -> float:
    """Return the largest noise multiplier whose total variation reaches ``advantage``."""

    def excess(noise: float) -> float:
        return total_variation([Release(sampling_rate, noise, steps)]) - advantage

    low, high = 1.0, 2.0
    while low > _LEAST_NOISE and excess(low) < 0:
        low, high = low / 2, low
    while high < _MOST_NOISE and excess(high) >= 0:
        low, high = high, 2 * high
    if high >= _MOST_NOISE or low <= _LEAST_NOISE:
        return min(high, _MOST_NOISE)
    # Rounded up: more noise gives a smaller, still valid bound on ε.
    return float(brentq(excess, low, high, xtol=1e-4)) + 2e-4


def subsampled(
    errors: AttackErrors, delta: float, confidence: float, *, sampling_rate: float, steps: int
) -> float:
    """Return ε's lower bound if the mechanism is the counted one with an unknown noise.

    Assumes ``steps`` Poisson-subsampled Gaussians at the known rate, fair coins and independent
    trials. A guess is then right with a chance of at most ``(1 + TV)/2``, TV the total variation
    of the composition: that gives the largest noise, and the noise gives ε.
    """
    trials = errors.outs + errors.ins
    wrong = at_most(errors.false_alarms + errors.misses, trials, confidence)
    noise = _noise_behind(1 - 2 * wrong, sampling_rate, steps)
    return epsilon([Release(sampling_rate, noise, steps)], delta) if noise < _MOST_NOISE else 0.0
