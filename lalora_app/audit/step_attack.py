"""The step audit: orthogonal canaries through the real private step, over a run's releases."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lalora_app.audit.canaries import SPREAD, Canaries, CanaryBackbone, CanaryData
from lalora_app.audit.estimators import AttackErrors, Guesses, one_run, roc, subsampled
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.budget import Limit, noise_for
from lalora_app.privacy.ledger import Ledger, Reservation
from lalora_app.privacy.randomness import seed_of, seeded
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.private_step.step import RandomStreams, private_gradient

Step = Callable[..., NoisedGrads]  # takes what trainer.private_gradient takes
Shapes = Mapping[str, tuple[int, ...]]
_FLOOR = 1e-3  # of a noise that is taken for a Gaussian's, in clip norms
_SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the canaries, guessed on either side
_SELECTION_CONFIDENCE = (
    0.999  # confidence at which attacks are compared: a few lucky guesses do not win
)
_MICRO_BATCH = 128
_COIN = 0.5  # the chance of each canary to be in
_ALONE = {f"tensor {i}": (9,) for i in range(SPREAD)}  # room for one canary and 64 blanks


@dataclass(frozen=True)
class CountedReleases:
    """What the ledger has counted of a run, and what that promises.

    Attributes:
        release: sampling rate, noise multiplier, and the number of all releases.
        delta: of the promise.
        epsilon: what the ledger says was spent: the upper bound.
        clip_norm: C.
    """

    release: Release
    delta: float
    epsilon: float
    clip_norm: float


def counted_releases(
    limit: Limit, *, rate: float, rounds: int, steps: int, clip_norm: float
) -> CountedReleases:
    """Return a run's releases, booked in a real ledger of its own as a client books them.

    Args:
        limit: ε and δ of the run.
        rate: q of the client.
        rounds: of the run.
        steps: a round.
        clip_norm: C.
    """
    total = rounds * steps
    nobody = Limit(float("inf"), limit.delta)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for t in range(1, rounds + 1):
            past, left = ledger.releases("audit", "audit"), total - steps * (t - 1)
            noise = noise_for(past, limit, sampling_rate=rate, steps=left)
            ledger.reserve(
                *("audit", "audit", t, Release(rate, noise, steps)),
                planned=left,
                run_limit=limit,
                node_limit=nobody,
            )
        spent = epsilon(ledger.releases("audit", "audit"), limit.delta)
    return CountedReleases(Release(rate, noise, total), limit.delta, spent, clip_norm)


@dataclass(frozen=True)
class Observed:
    """What the attacker sees of a run, or of several side by side.

    Attributes:
        x: (releases, canaries), each release along each canary's direction, in clip norms.
        noise: (releases, 1 or canaries), the noise's deviation where no canary is.
        members: (canaries,), the truth.
    """

    x: np.ndarray
    noise: np.ndarray
    members: np.ndarray


def _projections(
    plan: CountedReleases, canaries: Canaries, step: Step, streams: RandomStreams
) -> Iterator[Any]:
    data, backbone = CanaryData(canaries), CanaryBackbone(canaries)
    reservation = Reservation(plan.release)
    for _ in range(plan.release.count):
        release = step(
            cast(Any, backbone),
            cast(Any, data),
            reservation=reservation,
            clip_norm=plan.clip_norm,
            micro_batch=_MICRO_BATCH,
            streams=streams,
        )
        yield canaries.projected(release) * plan.release.sampling_rate * len(data)


def observe(
    plan: CountedReleases,
    shapes: Shapes,
    count: int,
    seed: int,
    *,
    blanks: int,
    step: Step = private_gradient,
) -> Observed:
    """Run a whole run's private steps on canaries, half of them in, and project the releases.

    Args:
        plan: what is released.
        shapes: of the tensors of a release.
        count: of the canaries.
        seed: of coins, batches and noise; the canaries are nobody's data.
        blanks: directions that show the noise alone.
        step: the private step, or a broken one.
    """
    members = seeded(seed, "audit coins").random(count) < _COIN
    canaries = Canaries(shapes, members, blanks, plan.clip_norm)
    streams = RandomStreams(seeded(seed, "audit sampling"), seeded(seed, "audit noise"))
    x = np.stack(list(_projections(plan, canaries, step, streams)))
    return Observed(x[:, :count], x[:, count:].std(axis=1, keepdims=True), members)


def side_by_side(runs: list[Observed]) -> Observed:
    """Return several runs as one game: their coins are independent."""
    noise = [np.broadcast_to(run.noise, run.x.shape) for run in runs]
    x, members = [run.x for run in runs], [run.members for run in runs]
    return Observed(np.hstack(x), np.hstack(noise), np.concatenate(members))


def alone(
    plan: CountedReleases, trials: int, seed: int, *, step: Step = private_gradient
) -> Observed:
    """Observe ``trials`` runs whose only record is the canary: most of their batches are empty."""
    runs = [
        observe(plan, _ALONE, 1, seed_of(seed, "audit alone", i), blanks=64, step=step)
        for i in range(trials)
    ]
    return side_by_side(runs)


def likelihood(seen: Observed, rate: float | np.ndarray) -> np.ndarray:
    """Return (canaries,): log P(seen | in) / P(seen | out) under Poisson sampling at ``rate``.

    Args:
        seen: by the attacker.
        rate: q, of all releases, or (releases, 1).
    """
    noise = np.maximum(seen.noise, _FLOOR)
    shift = (2 * seen.x - 1) / (2 * noise**2)
    with np.errstate(divide="ignore"):  # rate 1: the canary is in every batch
        absent, present = np.log1p(-rate), np.log(rate)
    ratios: np.ndarray = np.logaddexp(absent, present + shift).sum(axis=0)
    return ratios


def centred(seen: Observed, rate: float) -> np.ndarray:
    """Return the likelihood ratio after the run's median is taken off: noise that repeats goes."""
    level = np.median(seen.x, axis=0)
    rest = seen.x - level
    spread = np.median(np.abs(rest), axis=1, keepdims=True) * 1.4826
    return likelihood(Observed(rest, spread, seen.members), rate)


def noisy_releases(seen: Observed, rate: float) -> np.ndarray:
    """Return how many releases had any noise: does an empty batch show?"""
    noisy: np.ndarray = np.broadcast_to(seen.noise > _FLOOR, seen.x.shape).sum(axis=0, dtype=float)
    return noisy


Attack = Callable[[Observed, float], np.ndarray]
ATTACKS: dict[str, Attack] = {
    "likelihood": likelihood,
    "centred": centred,
    "noisy releases": noisy_releases,
}


def guessed(scores: np.ndarray, members: np.ndarray, share: float) -> Guesses:
    """Guess "in" for the highest ``share`` of scores and "out" for the lowest."""
    k = max(1, int(share * len(scores)))
    order = np.argsort(scores, kind="stable")
    correct = members[order[-k:]].sum() + (~members[order[:k]]).sum()
    return Guesses(int(correct), 2 * k, len(scores))


@dataclass(frozen=True)
class Bound:
    """A lower bound on ε and the game that it comes from.

    Attributes:
        epsilon: the bound that assumes (ε, δ)-DP alone.
        attack: which attack was chosen, on the half of the canaries that the bound leaves out.
        guesses: of that attack on the other half.
        errors: of the likelihood attack at its threshold 0, on all canaries.
        roc: of the chosen attack, on all canaries.
    """

    epsilon: float
    attack: str
    guesses: Guesses
    errors: AttackErrors
    roc: list[tuple[float, float]]


def _chosen(
    scores: Mapping[str, np.ndarray], members: np.ndarray, delta: float
) -> tuple[str, float]:
    """Return the attack and share of guesses with the largest bound."""
    options = [(name, share) for name in scores for share in _SHARES]
    return max(
        options,
        key=lambda o: one_run(guessed(scores[o[0]], members, o[1]), delta, _SELECTION_CONFIDENCE),
    )


def attack_errors(scores: np.ndarray, members: np.ndarray) -> AttackErrors:
    """Return how often "in where the ratio is above 1" errs."""
    said = scores > 0
    return AttackErrors(
        int((said & ~members).sum()),
        int((~members).sum()),
        int((~said & members).sum()),
        int(members.sum()),
    )


def bounded(
    seen: Observed,
    plan: CountedReleases,
    confidence: float,
    attacks: Mapping[str, Attack] = ATTACKS,
) -> Bound:
    """Attack what was seen. Even canaries choose the attack, odd ones pay for the bound."""
    rate = plan.release.sampling_rate
    scores = {name: attack(seen, rate) for name, attack in attacks.items()}
    first = {name: values[::2] for name, values in scores.items()}
    name, share = _chosen(first, seen.members[::2], plan.delta)
    guesses = guessed(scores[name][1::2], seen.members[1::2], share)
    errors = attack_errors(scores["likelihood"], seen.members)
    found = one_run(guesses, plan.delta, confidence)
    return Bound(found, name, guesses, errors, roc(scores[name], seen.members))


def by_curve(bound: Bound, plan: CountedReleases, confidence: float) -> float:
    """Return the bound if the mechanism is the accountant's with an unknown noise."""
    rate, steps = plan.release.sampling_rate, plan.release.count
    return subsampled(bound.errors, plan.delta, confidence, sampling_rate=rate, steps=steps)
