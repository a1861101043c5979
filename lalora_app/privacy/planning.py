"""Plan a run: noise and cost of each choice of batch, local steps and rounds.

In: the number of a client's examples, ε, δ and a limit on the cost. Out: choices within the limit.
Only the accountant computes: no data, model or ledger is read, and nothing is spent.

**Noise over signal.** A step's noise in the mean of m clients' gradients has, in every entry, the
standard deviation z·C/(b·√m): clip norm C, noise multiplier z, expected batch b. With noise that
the clients share it is z·C/(b·√(m·h)), with h = m - 1 - c if c clients may collude and nobody is
missing. Noises of S steps add up to √S of that. A signal of length g per step
adds up to S·g, with g at most C. With g = C, the ratio in one entry is

    z / (b·√(m·S))  with each client's own noise,  z / (b·√(m·h·S))  with shared noise.

One client with all data has z / (b·√S), with its own b.

Over d trained parameters it is √d times as large, and C/g times for shorter gradients. Neither
factor is known before the run, and both are taken as equal for all choices: compare two choices.
It leaves out curvature, the bias of clipping, and the drift of clients over many local steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from lalora_app.privacy.accounting import Release, calibrate
from lalora_app.settings.errors import ConfigError

LEAST_STEPS = 40  # with fewer, an optimiser has hardly moved, however small the noise is
LOCAL_STEPS = (1, 2, 4)
EQUAL_NOISE = 1.01  # a ratio of noise up to which two choices count as equal
_DOUBLINGS = 5  # numbers of steps in the grid: the smallest one, doubled up to four times
# A run has far fewer; the accountant alone would need minutes for more.
_MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Speed:
    """How fast clients train.

    Attributes:
        examples_per_second: examples per second in the private steps of one client.
        at_once: number of clients that train at the same time, each at this speed.
        seconds_per_round: everything else in a round, such as the evaluation.
    """

    examples_per_second: float
    at_once: int = 1
    seconds_per_round: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a plan starts from.

    Attributes:
        examples: n, the number of examples of the smallest client; its noise is the largest.
        clients: number of clients.
        per_round: m, number of clients in each round.
        epsilon: ε of every client over the whole run; finite.
        delta: δ of the guarantee.
        max_examples: examples that a client may train on in the whole run, repeats counted.
        max_seconds: duration of the run without its start.
        speed: needed for the duration; None: it is not estimated.
        min_steps: smallest number of optimiser steps of the run.
        local_steps: numbers of local steps per round to choose from.
        past: releases of every client besides its steps, such as its class sums.
        rounds_before: rounds without steps, such as that of the class sums; no choice counts them.
        head_rounds: rounds that train the head alone; every choice has more rounds than these.
        one_rate: whether all clients draw with one sampling rate; n is then their mean number.
        shared: whether the clients share the noise, so that choices are compared by shared noise.
        colluding: c, the clients whose noise an attacker of shared noise may know.
    """

    examples: float
    clients: int
    per_round: int
    epsilon: float
    delta: float
    max_examples: float = math.inf
    max_seconds: float = math.inf
    speed: Speed | None = None
    min_steps: int = LEAST_STEPS
    local_steps: Sequence[int] = LOCAL_STEPS
    past: tuple[Release, ...] = ()
    rounds_before: int = 0
    head_rounds: int = 0
    one_rate: bool = False
    shared: bool = False
    colluding: int = 0

    def client_rounds(self, rounds: int) -> int:
        """Return the rounds of the client that is selected most often."""
        return -(-rounds * self.per_round // self.clients)

    def seconds(self, batch_size: float, local_steps: int, rounds: int) -> float:
        """Return the duration of a run without its start; inf if no speed is given."""
        if self.speed is None:
            return math.inf
        turns = -(-self.per_round // self.speed.at_once)
        examples = rounds * turns * local_steps * batch_size  # one after the other
        fixed = rounds * self.speed.seconds_per_round
        return fixed + examples / self.speed.examples_per_second


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One choice of batch, local steps and rounds.

    Attributes:
        batch_size: b, expected number of examples of a client's step.
        local_steps: steps of a client in each of its rounds.
        rounds: number of rounds with steps.
        releases: steps of the client that is selected most often: what its ledger counts.
        sampling_rate: q = b/n.
        noise_multiplier: z, the smallest with which the releases cost at most ε.
        own_noise: noise over signal with each client's own noise, see the module.
        shared_noise: noise over signal with noise that the clients of a round share.
        noise: the one of these that the run has.
        seconds: duration without the start; inf if no speed is given.
    """

    batch_size: float
    local_steps: int
    rounds: int
    releases: int
    sampling_rate: float
    noise_multiplier: float
    own_noise: float
    shared_noise: float
    noise: float
    seconds: float

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.local_steps * self.rounds

    @property
    def examples(self) -> float:
        """Expected number of examples that a client trains on, repeats counted."""
        return self.batch_size * self.releases


@lru_cache(maxsize=1024)
def _noise_multiplier(
    epsilon: float, delta: float, sampling_rate: float, releases: int, past: tuple[Release, ...]
) -> float:
    """Calibrate once: choices that differ in local steps only have the same noise.

    Raises:
        ConfigError: if no noise is enough.
    """
    try:
        return calibrate(epsilon, delta, sampling_rate=sampling_rate, steps=releases, past=past)
    except ValueError:
        raise ConfigError(
            f"privacy.epsilon={epsilon:g} must be larger: no noise is enough for {releases} steps "
            f"with sampling rate {sampling_rate:.3g} at privacy.delta={delta:g}"
        ) from None


def check_choice(given: Given, batch_size: float, local_steps: int, rounds: int) -> None:
    """Check a choice as far as that needs no accountant.

    Raises:
        ConfigError: if the run has too many steps to be planned, or the batch is larger than the
            client's data.
    """
    if local_steps * rounds > _MOST_STEPS:
        raise ConfigError(
            f"num-server-rounds={rounds} must be at most {_MOST_STEPS // local_steps} with "
            f"train.local-steps={local_steps}, to be planned"
        )
    if batch_size > given.examples:
        raise ConfigError(
            f"train.batch-size={batch_size:g} must be at most {given.examples:g}, the number of "
            "the smallest client's examples"
        )


def choice(given: Given, batch_size: float, local_steps: int, rounds: int) -> Choice:
    """Return noise and cost of one choice, whether it is within the limits or not.

    Raises:
        ConfigError: as :func:`check_choice`, or if ε is too small.
    """
    check_choice(given, batch_size, local_steps, rounds)
    releases, q = local_steps * given.client_rounds(rounds), batch_size / given.examples
    z = _noise_multiplier(given.epsilon, given.delta, q, releases, given.past)
    own = z / (batch_size * math.sqrt(given.per_round * local_steps * rounds))
    shared = own / math.sqrt(max(given.per_round - 1 - given.colluding, 1))
    return Choice(
        batch_size=batch_size,
        local_steps=local_steps,
        rounds=rounds,
        releases=releases,
        sampling_rate=q,
        noise_multiplier=z,
        own_noise=own,
        shared_noise=shared,
        noise=shared if given.shared else own,
        seconds=given.seconds(batch_size, local_steps, rounds),
    )


def _largest_batch(given: Given, local_steps: int, rounds: int) -> int:
    """Return the largest batch within the limits; 0: not even one example per step is."""
    batch: float = given.examples
    if given.max_examples != math.inf:
        batch = min(batch, given.max_examples // (local_steps * given.client_rounds(rounds)))
    if given.max_seconds != math.inf:
        fixed, one = (given.seconds(b, local_steps, rounds) for b in (0, 1))
        if one > given.max_seconds:
            return 0
        if one > fixed:  # equal where one example takes no measurable time
            batch = min(batch, (given.max_seconds - fixed) // (one - fixed))
    return int(batch)


def _rounds(given: Given, local_steps: int, doubling: int = 0) -> int:
    """Return the rounds of the smallest number of steps, doubled so many times."""
    steps = given.min_steps << doubling
    return max(-(-steps // local_steps), given.head_rounds + 1)


def grid(given: Given) -> Iterator[tuple[int, int, int]]:
    """Yield (batch size, local steps, rounds) of every choice within the limits.

    For each number of steps, the batch is the largest that the limits allow: at the same steps a
    smaller batch has more noise. Numbers of steps: ``min_steps`` (made a multiple of the local
    steps), and its doubles; more where the rounds of the head alone leave the method no round.
    """
    seen = set()
    for doubling, local_steps in product(range(_DOUBLINGS), given.local_steps):
        rounds = _rounds(given, local_steps, doubling)
        cell = (_largest_batch(given, local_steps, rounds), local_steps, rounds)
        if cell[0] > 0 and local_steps * rounds <= _MOST_STEPS and cell not in seen:
            seen.add(cell)
            yield cell


def _least_time(given: Given) -> str:
    """Return what the fastest choice takes, in words: one example in each of the fewest steps."""
    rounds = [(_rounds(given, steps), steps) for steps in given.local_steps]
    fewest, steps = min(rounds, key=lambda found: given.seconds(1, found[1], found[0]))
    words = f"at this speed they take {math.ceil(given.seconds(1, steps, fewest)):,} s"
    evaluations = given.seconds(0, steps, fewest)
    if not evaluations:
        return words
    return f"{words}, {evaluations:,.0f} s of them for evaluations (evaluate-every)"


def check_limits(given: Given) -> None:
    """Check that at least one choice is within the limits, before anything is calibrated.

    Raises:
        ConfigError: naming the limit that allows none.
    """
    if given.min_steps > _MOST_STEPS:
        raise ConfigError(f"--min-steps {given.min_steps} must be at most {_MOST_STEPS}")
    if any(grid(given)):
        return
    law = f"must be enough for one example in each of {given.min_steps} steps (--min-steps)"
    if any(grid(replace(given, max_seconds=math.inf))):
        raise ConfigError(f"--max-seconds {given.max_seconds:g} {law}: {_least_time(given)}")
    raise ConfigError(f"--max-examples {given.max_examples} {law}")


def plan(given: Given, report: Callable[[int, int], None] = lambda done, of: None) -> list[Choice]:
    """Return all choices of the grid, those with the fewest steps first.

    Args:
        given: what the plan starts from.
        report: called before each choice with the number done and the number of all.

    Raises:
        ConfigError: if no choice is within the limits, or ε is too small.

    Privacy: only ``given`` is read; the numbers tell n, so show them where n may be known.
    """
    check_limits(given)
    found, cells = [], list(grid(given))
    for done, cell in enumerate(cells):
        report(done, len(cells))
        found.append(choice(given, *cell))
    return found


def best(choices: Sequence[Choice]) -> Choice:
    """Return the choice with the least noise over signal, of equal ones the cheapest.

    Choices up to 1 % above the least noise count as equal; then the fewest rounds win (each costs
    an upload), then the fewest examples.
    """
    limit = EQUAL_NOISE * min(found.noise for found in choices)
    equal = [found for found in choices if found.noise <= limit]
    return min(equal, key=lambda found: (found.rounds, found.examples, found.noise))
