"""The integers of a run: their unit, their range, and the sensitivity of a rounded sum.

A client's clipped sum is divided by the unit γ and rounded to nearest. One example changes a sum by
at most C, and rounding moves each of two numbers by at most 1/2, so the integers of d entries
change by at most Δ = C/γ + √d in l2. The noise of the sum of all clients has σ = z·Δ. A coarse unit
costs noise, the factor Δγ/C = 1 + √d·γ/C; a fine one needs a wide word.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lalora_app.settings.errors import ConfigError
from lalora_app.shared_noise.rounding import distance, slack
from lalora_app.shared_noise.shares import Cohort

Words = NDArray[np.uint32] | NDArray[np.uint64]

# Word width in bits, bits of the largest sum, and √d·γ/C. The first line that holds is taken. Sums
# stay below 2^53 so that they are exact in float64, and far coarser than its spacing at the noise.
_CHOICES = ((32, 31, 2.0**-10), (32, 31, 2.0**-7), (64, 53, 2.0**-10))
SLACK_SHARE = 1e-9  # of δ, that rounding may cost: so little that no ledger counts it
_LARGEST_INTEGER = 2.0**62


@dataclass(frozen=True)
class Constants:
    """Public constants of a run with shared noise; every party knows them before the first round.

    Attributes:
        clip_norm: C, largest l2 norm of an example's gradient.
        noise_multiplier: z, noise of the sum over its sensitivity; 0 means no privacy.
        sampling_rate: q, the chance of each example of each client to be in a batch.
        examples: size of the union of all clients' data, or an estimate from above. Only the range
            depends on it, not the privacy.
        entries: d, length of an upload.
        releases: T, sums of the whole run.
        epsilon: ε of the run.
        delta: δ of the run.
        cohort: clients, threshold, and colluding clients.
    """

    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    examples: int
    entries: int
    releases: int
    epsilon: float
    delta: float
    cohort: Cohort

    @property
    def expected_batch(self) -> float:
        """Return q times the size of the union: the divisor of the mean."""
        return self.sampling_rate * self.examples


@dataclass(frozen=True)
class Lattice:
    """The integers of a run.

    Attributes:
        constants: the run's public constants.
        unit: γ, the value of the integer 1, a power of two.
        word: w, bits of an uploaded entry, 32 or 64.
    """

    constants: Constants
    unit: float
    word: int

    @property
    def sensitivity(self) -> float:
        """Return Δ = C/γ + √d, in lattice units."""
        return self.constants.clip_norm / self.unit + math.sqrt(self.constants.entries)

    @property
    def noise_std(self) -> float:
        """Return σ = z·Δ, in lattice units: the noise of the counted shares of a sum."""
        return self.constants.noise_multiplier * self.sensitivity

    @property
    def largest_sum(self) -> float:
        """Return the largest entry of a sum that a run expects, in lattice units.

        (B + 10√B + 10)·C/γ for a Poisson batch of B expected examples of the union, n/2 for
        rounding, and ten standard deviations of the noise, at most σ·√(t/h). A larger entry wraps
        around, which costs accuracy and no privacy.
        """
        run, cohort = self.constants, self.constants.cohort
        batch = run.expected_batch + 10 * math.sqrt(run.expected_batch) + 10
        noise = self.noise_std * math.sqrt(cohort.most_noise())
        return batch * run.clip_norm / self.unit + cohort.clients / 2 + 10 * noise

    @property
    def distance(self) -> float:
        """Return the total variation distance of all releases from the Gaussian mechanism.

        T·d times that of an entry, with the most components and the smallest one.

        Limit: 0 without noise, where there is no promise.
        """
        run, cohort = self.constants, self.constants.cohort
        if run.noise_multiplier == 0:
            return 0.0
        smallest = self.noise_std**2 * float(min(cohort.fractions))
        return run.releases * run.entries * distance(cohort.most_summands(), smallest)

    @property
    def delta_slack(self) -> float:
        """Return (1 + e^ε)·T·d·distance of an entry, which is added to δ."""
        return slack(self.constants.epsilon, self.distance)


def _coarsest(constants: Constants, word: int, coarseness: float) -> Lattice:
    """Return the largest power of two with √d·γ/C ≤ ``coarseness`` and a small slack."""
    bound = coarseness * constants.clip_norm / math.sqrt(constants.entries)
    lattice = Lattice(constants, 2.0 ** math.floor(math.log2(bound)), word)
    while lattice.delta_slack >= SLACK_SHARE * constants.delta:
        lattice = Lattice(constants, lattice.unit / 2, word)
    return lattice


def _check(constants: Constants) -> None:
    if not 0 < constants.clip_norm < math.inf:
        raise ConfigError(
            f"privacy.clip-norm={constants.clip_norm} must be finite and greater than 0 for "
            'privacy.noise-share="sum": the noise of all clients is a multiple of it'
        )
    if not 0 < constants.sampling_rate <= 1:
        raise ConfigError(
            f"train.sampling-rate={constants.sampling_rate} must be greater than 0 and at most 1"
        )


def choose(constants: Constants) -> Lattice:
    """Return the unit and the word width of a run.

    The noise grows by at most 0.1 % by rounding where that fits into 32 bits; else by at most
    0.8 % in 32 bits; else by at most 0.1 % in 64 bits. The slack is below 1e-9 of δ.

    Args:
        constants: the public constants; every client and the server choose the same.

    Raises:
        ConfigError: if not even integers of 54 bits hold a sum.

    Privacy: depends on public constants only.
    """
    _check(constants)
    for word, bits, coarseness in _CHOICES:
        lattice = _coarsest(constants, word, coarseness)
        if lattice.largest_sum < 2.0**bits:
            return lattice
    raise ConfigError(
        f"train.sampling-rate={constants.sampling_rate:g} must be smaller for "
        f'privacy.noise-share="sum": a sum over {constants.expected_batch:.3g} examples with '
        f"{constants.entries} entries and noise multiplier {constants.noise_multiplier:g} needs "
        f"integers of {math.log2(lattice.largest_sum) + 1:.0f} bits, and must need at most 54"
    )


def to_lattice(clipped_sum: NDArray[np.float64], unit: float) -> NDArray[np.int64]:
    """Return round(x/γ) of a client's clipped sum, (d,) integers.

    Args:
        clipped_sum: (d,), the sum of the batch's clipped gradients, in float64; zeros for an empty
            batch.
        unit: γ.

    Limit: entries beyond ±2^62 units are cut there, which moves no two sums apart.

    Raises:
        ValueError: if an entry is not finite; the sum of clipped gradients never is.

    Privacy: one example changes the result by at most Δ = C/γ + √d in l2. The result is not
    private: a share of noise must be added before it leaves the site.
    """
    if not np.isfinite(clipped_sum).all():
        raise ValueError("a clipped sum must be finite")
    steps = np.rint(clipped_sum / unit).clip(-_LARGEST_INTEGER, _LARGEST_INTEGER)
    return steps.astype(np.int64)


def to_words(integers: NDArray[np.int64], word: int) -> Words:
    """Return integers modulo 2^w, as unsigned words of 32 or 64 bits."""
    return integers.astype(np.uint32) if word == 32 else integers.astype(np.uint64)


def mean(total: Words, lattice: Lattice, divisor: float) -> NDArray[np.float64]:
    """Return the mean gradient γ·Σ/divisor from a sum of uploads, (d,) in float64.

    Args:
        total: (d,), the sum modulo 2^w. Entries within ±2^(w-1) are exact, others wrap around.
        lattice: the integers of the run.
        divisor: a public constant, as q times the size of the union.

    Privacy: post-processing of the noised sum.
    """
    signed = total.view(np.int32) if lattice.word == 32 else total.view(np.int64)
    return signed.astype(np.float64) * (lattice.unit / divisor)
