"""The step audit: the real private step on worst-case canaries, over all releases of a run.

Each canary is in the data or not, by a coin. The attack guesses the coins from the releases, and
the correct guesses give a lower bound on ε (Steinke et al., arXiv:2305.08846).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lalora_app.audit.canaries import SPREAD, Canaries, CanaryBackbone, CanaryBatch, CanaryData
from lalora_app.audit.estimators import AttackErrors, Guesses, one_run, roc, subsampled
from lalora_app.privacy.counted_releases import CountedReleases
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seed_of, seeded
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.private_step.step import PrivateData, PrivateModel, RandomStreams, private_gradient

Shapes = Mapping[str, tuple[int, ...]]
_LEAST_NOISE = 1e-3  # smallest deviation that the attacks take for noise, in clip norms
_GUESSED = (0.003, 0.01, 0.03, 0.1, 0.3)  # shares of the canaries to guess "in", and "out"
# Confidence used only to choose the best attack; high, so that a small lucky sample is not chosen.
_SELECTION_CONFIDENCE = 0.999
MICRO_BATCH = 128
_MEMBER_CHANCE = 0.5
_SINGLE_BLANKS = 64  # directions that show the noise, in a run with a single canary
_SINGLE_SHAPES = {f"tensor {i}": (9,) for i in range(SPREAD)}  # 72 directions, for these and it


@dataclass(frozen=True)
class StepInputs:
    """The arguments of one private step on canaries, see :func:`private_gradient`.

    Attributes:
        model: the source of the canaries' gradients.
        data: the canaries as a dataset.
        reservation: sampling rate and noise multiplier of the counted releases.
        clip_norm: C.
        streams: random streams of the sampling and of the noise.
        canaries: the canaries themselves, for an attacker's own records.
        clipping: ``privacy.clipping`` of the run.
    """

    model: PrivateModel[CanaryBatch]
    data: PrivateData[CanaryBatch]
    reservation: Reservation
    clip_norm: float
    streams: RandomStreams
    canaries: Canaries
    clipping: str = "flat"


Step = Callable[[StepInputs], NoisedGrads]


def real_step(inputs: StepInputs) -> NoisedGrads:
    """Return one release of the private step that trains."""
    return private_gradient(
        inputs.model,
        inputs.data,
        reservation=inputs.reservation,
        clip_norm=inputs.clip_norm,
        micro_batch=MICRO_BATCH,
        streams=inputs.streams,
        clipping=inputs.clipping,
    )


@dataclass(frozen=True)
class Observed:
    """The attacker's view of a run, or of several runs side by side.

    Attributes:
        x: (releases, canaries), each release along each canary's direction, in clip norms.
        noise: (releases, 1 or canaries), standard deviation of the noise, in clip norms, measured
            along directions without a canary.
        members: (canaries,) bool, the truth to be guessed.
    """

    x: np.ndarray
    noise: np.ndarray
    members: np.ndarray


def _projections(
    plan: CountedReleases, canaries: Canaries, step: Step, streams: RandomStreams, views: int
) -> Iterator[np.ndarray]:
    """Yield (canaries + blanks,): the clipped sum of each view along every direction."""
    inputs = StepInputs(
        CanaryBackbone(canaries),
        CanaryData(canaries),
        Reservation(plan.release),
        plan.clip_norm,
        streams,
        canaries,
        plan.clipping,
    )
    for _ in range(views):
        mean = canaries.projected(step(inputs))
        yield mean * plan.release.sampling_rate * len(inputs.data)


def observe(
    plan: CountedReleases,
    shapes: Shapes,
    count: int,
    seed: int,
    *,
    blanks: int,
    step: Step = real_step,
    views: int | None = None,
) -> Observed:
    """Run all private steps of a run on canaries, half of them in, and project the releases.

    Args:
        plan: the run's releases.
        shapes: shapes of the tensors of one release, by name.
        count: number of canaries.
        seed: seed of coins, batches and noise; it may be known, because canaries are no data.
        blanks: number of directions that show the noise alone.
        step: the private step, or a broken one.
        views: number of calls of the step; None: one for each counted release.
    """
    calls = plan.release.count if views is None else views
    members = seeded(seed, "audit coins").random(count) < _MEMBER_CHANCE
    canaries = Canaries(shapes, members, blanks, plan.clip_norm)
    streams = RandomStreams(seeded(seed, "audit sampling"), seeded(seed, "audit noise"))
    x = np.stack(list(_projections(plan, canaries, step, streams, calls)))
    return Observed(x[:, :count], x[:, count:].std(axis=1, keepdims=True), members)


def side_by_side(runs: list[Observed]) -> Observed:
    """Return several runs as one game: their coins are independent."""
    noise = [np.broadcast_to(run.noise, run.x.shape) for run in runs]
    x, members = [run.x for run in runs], [run.members for run in runs]
    return Observed(np.hstack(x), np.hstack(noise), np.concatenate(members))


def observe_single_canary(
    plan: CountedReleases, trials: int, seed: int, *, step: Step = real_step
) -> Observed:
    """Observe ``trials`` runs with one record, the canary: most of their batches are empty."""
    runs = [
        observe(
            plan,
            _SINGLE_SHAPES,
            1,
            seed_of(seed, "audit alone", i),
            blanks=_SINGLE_BLANKS,
            step=step,
        )
        for i in range(trials)
    ]
    return side_by_side(runs)


def likelihood(seen: Observed, rate: float | np.ndarray) -> np.ndarray:
    """Return (canaries,): log P(seen | in) / P(seen | out) under Poisson sampling at ``rate``.

    Args:
        seen: the attacker's view.
        rate: the sampling rate q of all releases, or (releases, 1).
    """
    noise = np.maximum(seen.noise, _LEAST_NOISE)
    shift = (2 * seen.x - 1) / (2 * noise**2)
    with np.errstate(divide="ignore"):  # rate 1: the canary is in every batch
        absent, present = np.log1p(-rate), np.log(rate)
    ratios: np.ndarray = np.logaddexp(absent, present + shift).sum(axis=0)
    return ratios


def centred(seen: Observed, rate: float) -> np.ndarray:
    """Return the likelihood ratio without the run's median, which holds noise that repeats."""
    level = np.median(seen.x, axis=0)
    rest = seen.x - level
    spread = np.median(np.abs(rest), axis=1, keepdims=True) * 1.4826
    return likelihood(Observed(rest, spread, seen.members), rate)


def noisy_releases(seen: Observed, rate: float) -> np.ndarray:
    """Return (canaries,): the number of releases with noise, fewer if empty batches have none."""
    noisy = np.broadcast_to(seen.noise > _LEAST_NOISE, seen.x.shape)
    counts: np.ndarray = noisy.sum(axis=0, dtype=float)
    return counts


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
    """A lower bound on ε and the membership game that it comes from.

    Attributes:
        epsilon: lower bound that assumes (ε, δ)-DP alone.
        attack: name of the chosen attack; the canaries of the choice are not used for the bound.
        guesses: guesses of that attack about the other canaries.
        errors: errors of the likelihood attack at its threshold 0, on all canaries.
        roc: (false alarm rate, hit rate) by threshold of the chosen attack, on all canaries.
    """

    epsilon: float
    attack: str
    guesses: Guesses
    errors: AttackErrors
    roc: list[tuple[float, float]]


def _chosen(
    scores: Mapping[str, np.ndarray], members: np.ndarray, delta: float
) -> tuple[str, float]:
    """Return the attack and the share of guessed canaries with the largest bound."""
    options = [(name, share) for name in scores for share in _GUESSED]
    return max(
        options,
        key=lambda o: one_run(guessed(scores[o[0]], members, o[1]), delta, _SELECTION_CONFIDENCE),
    )


def attack_errors(scores: np.ndarray, members: np.ndarray) -> AttackErrors:
    """Return the errors of the guess "in if the likelihood ratio is above 1"."""
    guessed_in = scores > 0
    return AttackErrors(
        int((guessed_in & ~members).sum()),
        int((~members).sum()),
        int((~guessed_in & members).sum()),
        int(members.sum()),
    )


def bounded(
    seen: Observed,
    plan: CountedReleases,
    confidence: float,
    attacks: Mapping[str, Attack] = ATTACKS,
) -> Bound:
    """Return the bound of the best attack: even canaries choose it, odd ones give the bound."""
    rate = plan.release.sampling_rate
    scores = {name: attack(seen, rate) for name, attack in attacks.items()}
    even = {name: values[::2] for name, values in scores.items()}
    name, share = _chosen(even, seen.members[::2], plan.delta)
    guesses = guessed(scores[name][1::2], seen.members[1::2], share)
    errors = attack_errors(scores["likelihood"], seen.members)
    found = one_run(guesses, plan.delta, confidence)
    return Bound(found, name, guesses, errors, roc(scores[name], seen.members))


def by_curve(bound: Bound, plan: CountedReleases, confidence: float) -> float:
    """Return the lower bound on ε if the mechanism is the counted one with an unknown noise."""
    rate, steps = plan.release.sampling_rate, plan.release.count
    return subsampled(bound.errors, plan.delta, confidence, sampling_rate=rate, steps=steps)
