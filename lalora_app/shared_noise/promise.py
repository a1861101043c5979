"""The two ε of releases with shared noise: of the sum, and of one upload alone.

Of the sum: what the server, other clients and users of the model learn, if at most c clients
collude. Alone: what a server learns that opens one client's upload after all; it needs no trust in
anyone. Both hold for one example of one client, absent or present.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.shared_noise.rounding import slack
from lalora_app.shared_noise.shares import Cohort


@dataclass(frozen=True)
class Promise:
    """ε at δ, where δ already holds what rounding costs."""

    epsilon: float
    delta: float


def of_sum(releases: Sequence[Release], delta: float, distance: float) -> Promise:
    """Return what the sums promise: ε of the multiplier z, at δ + (1 + e^ε)·distance.

    Args:
        releases: the sums, with the multiplier z of the whole noise.
        delta: δ of the accountant.
        distance: ``Lattice.distance`` of these releases, added up over runs.

    Limits: no releases give ε = 0; no noise gives ε = inf.

    Privacy: holds if the counted clients of every sum ran this code and at most c collude.
    """
    spent = epsilon(releases, delta)
    return Promise(spent, delta if math.isinf(spent) else delta + slack(spent, distance))


def alone_multiplier(multiplier: float, cohort: Cohort) -> float:
    """Return z/√N with N = n - 1 - c, the noise multiplier of one client's upload.

    It is not z/√h: when nobody is missing, the seeds of all components but the first are revealed,
    and σ²/N is left in an upload. Limit: z if one share is counted on in any case.
    """
    return multiplier / math.sqrt(cohort.honest_if_all_upload)


def alone(releases: Sequence[Release], delta: float, cohort: Cohort) -> Promise:
    """Return what one client's uploads promise if each of them is opened: ε of z/√N, at δ.

    Rounding costs nothing here: an upload with the first component alone is the rounded output of
    the Gaussian mechanism, and what else is added is independent of the data.

    Args:
        releases: the sums that the uploads went into, with the multiplier z of the whole noise.
        delta: δ of the accountant.
        cohort: clients, threshold, and colluding clients of these sums.

    Limits: as in :func:`of_sum`, and the same ε if N = 1.

    Privacy: holds whatever the server and the other clients do.
    """
    opened = [
        replace(r, noise_multiplier=alone_multiplier(r.noise_multiplier, cohort)) for r in releases
    ]
    return of_sum(opened, delta, distance=0.0)
