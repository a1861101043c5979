"""The releases of one client's run, as its ledger counts them: the promise that an audit tests."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.budget import Limit, noise_for
from lalora_app.privacy.ledger import Ledger


@dataclass(frozen=True)
class CountedReleases:
    """The releases of a run in the ledger, and their promise.

    Attributes:
        release: sampling rate, noise multiplier, and the number of all releases.
        delta: δ of the promise.
        epsilon: ε of all releases by the ledger: the upper bound.
        clip_norm: C.
        clipping: ``privacy.clipping`` of the run.
    """

    release: Release
    delta: float
    epsilon: float
    clip_norm: float
    clipping: str = "flat"


def counted_releases(
    limit: Limit,
    *,
    rate: float,
    rounds: int,
    steps: int,
    clip_norm: float,
    clipping: str = "flat",
    noise_multiplier: float | None = None,
) -> CountedReleases:
    """Return a run's releases, counted in a temporary ledger as a client counts them.

    Args:
        limit: ε and δ of the run.
        rate: the client's sampling rate q.
        rounds: number of rounds in which the client takes part.
        steps: local steps per round.
        clip_norm: C.
        clipping: ``privacy.clipping`` of the run.
        noise_multiplier: z of all releases; None: calibrated to the limit.
    """
    total = rounds * steps
    unlimited = Limit(float("inf"), limit.delta)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for t in range(1, rounds + 1):
            past, left = ledger.releases("audit", "audit"), total - steps * (t - 1)
            noise = noise_multiplier or noise_for(past, limit, sampling_rate=rate, steps=left)
            ledger.reserve(
                *("audit", "audit", t, Release(rate, noise, steps)),
                planned=left,
                run_limit=limit,
                node_limit=unlimited,
            )
        spent = epsilon(ledger.releases("audit", "audit"), limit.delta)
    return CountedReleases(Release(rate, noise, total), limit.delta, spent, clip_norm, clipping)
