"""(q, noise multiplier, count) <-> ε: composition of Poisson-subsampled Gaussian releases.

The ledger uses Opacus' PRV accountant (Gopi et al., arXiv:2106.02848), an upper bound that is tight
to ``EPSILON_ERROR``. Google's PLD accountant is an independent check.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lalora_app.privacy.opacus_accountants import accountants

EPSILON_ERROR = 0.003  # additive; both accountants then agree to 1 % from ε = 0.3 upwards
# Above this ε, PRV needs seconds and gigabytes and reaches the limit of floating-point numbers: use
# RDP, a larger bound that is still valid.
PRV_TRUSTED = 500.0
_COARSE = 1e-3  # ten times Google's default; changes an audit's bound by less than 1e-4 of it
# Limit of ε·√count, to which the size of PRV's grid is proportional. Above it, PRV needs more than
# 1 GB of memory, and a server may request any count: use RDP: its ε is about 10 % larger and valid.
PRV_GRID = 2_000.0
SMALLEST_NOISE = 2.0**-6
LARGEST_NOISE = 2.0**12  # a run with more noise learns nothing
RELATIVE_TOLERANCE = 1e-3  # of the calibrated noise multiplier, which is rounded up


@dataclass(frozen=True)
class Release:
    """``count`` noisy clipped sums of Poisson batches.

    Attributes:
        sampling_rate: q, the chance of each example to be in a batch.
        noise_multiplier: noise standard deviation over clip norm; 0 means no privacy.
        count: number of sums released.
    """

    sampling_rate: float
    noise_multiplier: float
    count: int


def _grouped(releases: Sequence[Release]) -> tuple[tuple[float, float, int], ...]:
    counts: Counter[tuple[float, float]] = Counter()
    for release in releases:
        counts[release.sampling_rate, release.noise_multiplier] += release.count
    return tuple(sorted((q, z, n) for (q, z), n in counts.items() if n > 0))


@lru_cache(maxsize=4096)
def _upper_bound(groups: tuple[tuple[float, float, int], ...], delta: float) -> tuple[float, bool]:
    """Return ε, and whether it is the tight bound of PRV."""
    history = [(z, q, n) for q, z, n in groups]
    tight, loose = (kind() for kind in accountants())
    tight.history = loose.history = history
    # Opacus warns of log(0) at q = 1 and of RDP orders; its bounds are valid in both cases.
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")
        safe, found = float(loose.get_epsilon(delta=delta)), math.inf
        if safe > PRV_TRUSTED or safe * math.sqrt(sum(n for _, _, n in groups)) > PRV_GRID:
            return safe, False
        with contextlib.suppress(RuntimeError):  # PRV fails at a very large ε
            found = float(tight.get_epsilon(delta=delta, eps_error=EPSILON_ERROR))
        return (found, True) if found < PRV_TRUSTED else (safe, False)


def epsilon(releases: Sequence[Release], delta: float) -> float:
    """Return ε of the adaptive composition of ``releases`` at ``delta`` (PRV upper bound).

    Adjacency: zero-out, one example of one client replaced by an empty record, sizes known.
    Limits: no releases give 0; a release without noise gives inf.
    """
    groups = _grouped(releases)
    if not groups:
        return 0.0
    return math.inf if any(z == 0 for _, z, _ in groups) else _upper_bound(groups, delta)[0]


def is_tight(releases: Sequence[Release], delta: float) -> bool:
    """Tell whether :func:`epsilon` uses PRV; otherwise it uses RDP, a larger valid bound."""
    groups = _grouped(releases)
    private = bool(groups) and all(z > 0 for _, z, _ in groups)
    return not private or _upper_bound(groups, delta)[1]


def _composed(groups: tuple[tuple[float, float, int], ...], width: float = 1e-4) -> Any:
    """Return Google's accountant after all releases; ``width`` is its grid of privacy losses."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, width)
    for q, z, n in groups:
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, n))
    return accountant


def second_epsilon(releases: Sequence[Release], delta: float) -> float:
    """Return ε as :func:`epsilon` does, by an accountant without common code (PLD)."""
    groups = _grouped(releases)
    if any(z == 0 for _, z, _ in groups):
        return math.inf
    return float(_composed(groups).get_epsilon(delta)) if groups else 0.0


def total_variation(releases: Sequence[Release]) -> float:
    """Return the total variation distance of outputs with and without one example (PLD).

    It is δ at ε = 0: the largest difference of hit rate and false-alarm rate of any test.

    Limit: no releases give 0.

    Raises:
        ValueError: for a noise multiplier of 0.
    """
    groups = _grouped(releases)
    if any(z == 0 for _, z, _ in groups):
        raise ValueError("noise multiplier 0 must be greater than 0 for a total variation")
    return float(_composed(groups, _COARSE).get_delta(0.0)) if groups else 0.0


def _smallest(excess: Callable[[float], float], high: float) -> float:
    """Return the smallest noise multiplier with ``excess`` ≤ 0, which holds at ``high``."""
    low = high / 2
    while excess(low) <= 0:
        if low < SMALLEST_NOISE:
            return low
        low, high = low / 2, low
    from scipy.optimize import brentq  # takes half a second to import

    found = float(brentq(excess, low, high, xtol=RELATIVE_TOLERANCE * low))
    while excess(found) > 0:  # the root is only approximate; the target is a strict limit
        found *= 1 + RELATIVE_TOLERANCE
    return found


def smallest_epsilon(
    delta: float, *, sampling_rate: float, steps: int, past: Sequence[Release] = ()
) -> float:
    """Return the smallest ε that :func:`calibrate` can reach, with the largest noise.

    Args:
        delta: δ of the guarantee.
        sampling_rate: q of the releases.
        steps: number of releases.
        past: earlier releases under the same guarantee.

    Limit: about ``EPSILON_ERROR``, however few the releases are.
    """
    return epsilon([*past, Release(sampling_rate, LARGEST_NOISE, steps)], delta)


def calibrate(
    target: float, delta: float, *, sampling_rate: float, steps: int, past: Sequence[Release] = ()
) -> float:
    """Return the smallest noise multiplier with which ``steps`` more releases keep ε ≤ target.

    Args:
        target: largest ε of ``past`` and the new releases together; inf gives 0, no noise.
        delta: δ of the guarantee.
        sampling_rate: q of the new releases.
        steps: number of new releases.
        past: earlier releases under the same guarantee.

    Raises:
        ValueError: if ``past`` has used all of the target, or no noise is enough for it.
    """
    if math.isinf(target):
        return 0.0
    if past and epsilon(past, delta) >= target:
        raise ValueError(f"the releases so far leave nothing of epsilon={target} to spend")

    def excess(noise_multiplier: float) -> float:
        planned = Release(sampling_rate, noise_multiplier, steps)
        return epsilon([*past, planned], delta) - target

    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > LARGEST_NOISE:
            raise ValueError(f"epsilon={target} leaves too little for {steps} releases")
    return _smallest(excess, high)
