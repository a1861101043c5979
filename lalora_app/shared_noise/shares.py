"""How the noise of a sum is shared among clients, some of which are absent or dishonest.

σ² is the promised variance of the noise in a sum. Of n clients, D are missing in the sum, at most
n - t. An attacker is one of the clients and may know the noise of c more, so it knows up to 1 + c
of the n - D shares. N = n - 1 - c shares are left to count on when nobody is missing, and h = t - 1
- c when as many as possible are. With D missing a counted share must have the variance
σ²/(N - D). No client knows D when it uploads, so each adds components (XNoise, arXiv:2209.12528),
one per level L_j = 0, 1, 2, 4, 8, … n - t of missing clients::

    0:            σ²/N                                 needed always
    j = 1 … J:    σ²/(N-L_j) - σ²/(N-L_{j-1})          needed if more than L_{j-1} are missing

Components 0 … j add up to σ²/(N - L_j), where L_j is the smallest level that is D or more. The
seeds of the others are revealed, and their noise is subtracted from the sum. Then N - D or more
counted shares have σ² or more, and the whole sum has (n - D)/(N - L_j)·σ².
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count, pairwise, takewhile

from lalora_app.settings.errors import ConfigError


@dataclass(frozen=True)
class Cohort:
    """The clients of a round, and the most that may be absent or dishonest.

    Attributes:
        clients: n, clients that begin the round.
        threshold: t, the fewest uploads in a sum.
        colluding: c, clients whose noise an attacker may know beside its own.

    Raises:
        ConfigError: if fewer than one share is left to count on, h = t - 1 - c < 1.
    """

    clients: int
    threshold: int
    colluding: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.clients:
            raise ConfigError(
                f"threshold={self.threshold} must be from 1 to the {self.clients} clients"
            )
        if not 0 <= self.colluding <= self.threshold - 2:
            raise ConfigError(
                f"colluding={self.colluding} must be from 0 to {self.threshold - 2}: of the "
                f"{self.threshold} smallest number of uploads, the attacker's own and those of "
                "colluding clients do not count, and one must be left"
            )

    @classmethod
    def of(cls, clients: int, colluding: int = 0) -> "Cohort":
        """Return the cohort of an attempt, with its threshold.

        t is the smallest number with (n - t)² < h = t - 1 - c. A server may tell each client
        another list of missing clients, or give it the shares of others only. Of the N = h + n - t
        honest clients each names at most n - t clients as missing, and a mask key takes h honest
        answers. So at most N(n - t)/h < n - t + 1 mask keys are revealed: no sum of fewer than t
        clients can be opened. Two sets of t clients have at least 2 + c in common, so at least one
        honest client, which answers once: no seed of noise is revealed at two levels.

        Args:
            clients: n, the clients with public keys.
            colluding: c, the key ``privacy.colluding``.

        Raises:
            ConfigError: if c is not from 0 to n - 2.
        """
        if not 0 <= colluding <= clients - 2:
            raise ConfigError(
                f"privacy.colluding={colluding} must be from 0 to {clients - 2} for {clients} "
                "clients: beside the attacker and colluding clients one must be left"
            )
        allowed = range(2 + colluding, clients + 1)
        threshold = next(t for t in allowed if (clients - t) ** 2 < t - 1 - colluding)
        return cls(clients, threshold, colluding)

    @property
    def honest(self) -> int:
        """Return h = t - 1 - c, the shares counted on when n - t clients are missing."""
        return self.threshold - 1 - self.colluding

    @property
    def honest_if_all_upload(self) -> int:
        """Return N = n - 1 - c, the shares counted on when nobody is missing."""
        return self.clients - 1 - self.colluding

    def alone(self, multiplier: float) -> float:
        """Return z/√N, the noise multiplier of one client's upload that is opened after all.

        It is not z/√h: when nobody is missing, the seeds of all components but component 0 are
        revealed, and σ²/N is left in an upload. Rounding costs nothing here: an upload with
        component 0 alone is the rounded output of the Gaussian mechanism, and what else is added
        does not depend on the data.

        Limit: z if one share is counted on in any case.

        Privacy: it needs no honest server and no other client.
        """
        return multiplier / math.sqrt(self.honest_if_all_upload)

    @property
    def most_missing(self) -> int:
        """Return n - t."""
        return self.clients - self.threshold

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Return L_0 … L_J: 0, the powers of two below n - t, and n - t."""
        most = self.most_missing
        powers = takewhile(lambda level: level < most, (1 << k for k in count()))
        return (0, *powers, most) if most else (0,)

    @property
    def removable(self) -> int:
        """Return J, the number of components that may be superfluous."""
        return len(self.levels) - 1

    def needed(self, missing: int) -> int:
        """Return j, the number of removable components that D missing clients leave in the sum.

        Args:
            missing: D, the clients whose upload is not in the sum. A client that uploads, and is
                away later, is not missing.

        Raises:
            ValueError: if D is not from 0 to n - t.

        Privacy: the seeds of the components from j + 1 may be revealed, once: two answers for
        different D reveal a component that one of the sums needs.
        """
        self._check(missing)
        return bisect_left(self.levels, missing)

    @cached_property
    def fractions(self) -> tuple[Fraction, ...]:
        """Return the variance of the components 0 … J of one client, as fractions of σ²."""
        totals = [self.share_fraction(level) for level in self.levels]
        steps = (after - before for before, after in pairwise(totals))
        return (totals[0], *steps)

    def share_fraction(self, missing: int) -> Fraction:
        """Return 1/(N - L_j): the variance of one client's needed components, over σ².

        Raises:
            ValueError: if D is not from 0 to n - t.
        """
        return Fraction(1, self.honest_if_all_upload - self.levels[self.needed(missing)])

    def sum_fraction(self, missing: int) -> Fraction:
        """Return (n - D)/(N - L_j): the variance of the noise in the whole sum, over σ².

        Limit: 1 + (1 + c)/N with nobody missing; n if one share must do.
        """
        return (self.clients - missing) * self.share_fraction(missing)

    def most_noise(self) -> Fraction:
        """Return the largest variance of the noise in a sum, over σ²."""
        return max(self.sum_fraction(missing) for missing in range(self.most_missing + 1))

    def most_summands(self) -> int:
        """Return the largest number of components in the counted part of a sum.

        It is (N - D)·(1 + j), for the D where it is largest.
        """
        counted = self.honest_if_all_upload
        return max((counted - d) * (1 + self.needed(d)) for d in range(self.most_missing + 1))

    def _check(self, missing: int) -> None:
        if not 0 <= missing <= self.most_missing:
            raise ValueError(f"missing={missing} must be from 0 to {self.most_missing}")
