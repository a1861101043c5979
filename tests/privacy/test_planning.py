"""The planner: its noise is the accountant's, its formula is a sum of noises, its limits hold."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers.shared_accounting  # noqa: F401
from lalora_app.privacy import planning
from lalora_app.privacy.accounting import Release, calibrate
from lalora_app.privacy.planning import Choice, Given, Speed, best, choice, grid, plan
from lalora_app.server.cohorts import plan_cohorts
from lalora_app.settings.errors import ConfigError
from lalora_app.shared_noise.shares import Cohort

DELTA = 1e-5
GIVEN = Given(
    examples=1000, clients=4, per_round=4, epsilon=3.0, delta=DELTA, max_examples=4000, min_steps=40
)
fast = settings(deadline=None, derandomize=True)


@pytest.fixture
def no_accountant(monkeypatch):
    """Noise by a formula that grows with q and steps, where the accountant plays no part."""

    def noise(epsilon, delta, q, steps, past):
        return (1 + q * math.sqrt(steps)) / epsilon

    monkeypatch.setattr(planning, "_noise_multiplier", noise)


def test_the_noise_multiplier_is_the_calibrated_one():
    found = choice(GIVEN, 50, 2, 10)
    assert found.releases == 20
    assert found.noise_multiplier == calibrate(3.0, DELTA, sampling_rate=0.05, steps=20)


def test_releases_besides_the_steps_leave_less_for_them():
    sums = Release(1.0, 8.0, 1)
    found = choice(replace(GIVEN, past=(sums,)), 50, 2, 10)
    z = calibrate(3.0, DELTA, sampling_rate=0.05, steps=20, past=[sums])
    assert found.noise_multiplier == z > choice(GIVEN, 50, 2, 10).noise_multiplier


@pytest.mark.parametrize(
    ("clients", "colluding", "steps"), [(1, 0, 1), (1, 0, 9), (3, 0, 4), (5, 2, 4)]
)
def test_noise_over_signal_is_that_of_a_sum_of_noises(clients, colluding, steps, no_accountant):
    """One entry of the mean update, added up step by step in float64; every gradient is C long."""
    entries, clip = 40_000, 0.5
    start = replace(GIVEN, clients=clients, per_round=clients, colluding=colluding)
    one = choice(start, 10, 1, steps)
    share = 1.0 if clients == 1 else Cohort.of(clients, colluding).alone(1.0)
    rng = np.random.default_rng(0)
    own, shared = np.zeros(entries), np.zeros(entries)
    for _ in range(steps):
        deviation = one.noise_multiplier * clip
        for _ in range(clients):
            own += rng.normal(0, deviation, entries) / one.batch_size / clients
            shared += rng.normal(0, share * deviation, entries) / (one.batch_size * clients)
    signal = steps * clip
    assert own.std() / signal == pytest.approx(one.own_noise, rel=0.02)
    assert shared.std() / signal == pytest.approx(one.shared_noise, rel=0.02)
    assert (one.own_noise == one.shared_noise) == (clients == 1)


@given(epsilon=st.floats(0.5, 4.0), batch=st.integers(20, 60), rounds=st.integers(2, 8))
@settings(max_examples=2, deadline=None, derandomize=True)
def test_noise_falls_with_epsilon_and_clients_and_grows_with_steps(epsilon, batch, rounds):
    start = replace(GIVEN, epsilon=epsilon)
    base = choice(start, batch, 2, rounds)
    assert choice(replace(start, epsilon=2 * epsilon), batch, 2, rounds).own_noise < base.own_noise
    more = choice(start, batch, 2, 4 * rounds)
    assert more.noise_multiplier > base.noise_multiplier
    assert choice(start, 2 * batch, 2, rounds).own_noise < base.own_noise
    wider = choice(replace(start, clients=16, per_round=16), batch, 2, rounds)
    assert wider.own_noise == pytest.approx(base.own_noise / 2)
    assert wider.shared_noise == pytest.approx(base.shared_noise / 2 * math.sqrt(3 / 15))


def test_at_equal_cost_larger_batches_have_less_noise():
    found = [choice(GIVEN, batch, 2, 200 // batch) for batch in (10, 20, 50)]
    assert len({each.examples for each in found}) == 1
    assert [each.own_noise for each in found] == sorted((e.own_noise for e in found), reverse=True)


@given(clients=st.integers(1, 9), per_round=st.integers(1, 9), rounds=st.integers(1, 30))
@fast
def test_a_client_is_accounted_for_the_rounds_of_the_most_selected_one(clients, per_round, rounds):
    per_round = min(clients, per_round)
    cohorts = plan_cohorts(clients, per_round, rounds, seed=0)
    most = max(Counter(client for cohort in cohorts for client in cohort).values())
    assert replace(GIVEN, clients=clients, per_round=per_round).client_rounds(rounds) == most


GIVENS = st.builds(
    Given,
    examples=st.integers(1, 10**6),
    clients=st.integers(5, 20),
    per_round=st.integers(1, 5),
    epsilon=st.just(1.0),
    delta=st.just(DELTA),
    max_examples=st.integers(1, 10**30),
    max_seconds=st.one_of(st.just(math.inf), st.floats(1e-3, 1e9)),
    speed=st.builds(
        Speed, st.floats(1e-3, 1e9), st.integers(1, 30), st.floats(0, 100, allow_subnormal=False)
    ),
    min_steps=st.integers(1, 1000),
    local_steps=st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True),
)


@given(start=GIVENS)
@fast
def test_every_choice_is_within_the_limits_and_its_batch_is_the_largest(start):
    for batch, local, rounds in grid(start):
        assert 1 <= batch <= start.examples
        assert local in start.local_steps
        assert start.min_steps <= local * rounds <= 16 * start.min_steps + local
        cost = batch * local * start.client_rounds(rounds)
        assert cost <= start.max_examples
        # Durations are floats.
        assert start.seconds(batch, local, rounds) <= start.max_seconds * (1 + 1e-9)
        larger = batch + 1
        assert (
            larger > start.examples
            or larger * local * start.client_rounds(rounds) > start.max_examples
            or start.seconds(larger, local, rounds) >= start.max_seconds * (1 - 1e-9)
        )


@pytest.mark.parametrize("first", [0, 39, 40, 100])
def test_every_choice_leaves_the_method_a_round(first):
    cells = list(grid(replace(GIVEN, head_rounds=first, max_examples=math.inf)))
    assert len(set(cells)) == len(cells) > 0
    assert min(rounds for _, _, rounds in cells) > first
    rest = [cell for cell in cells if cell[2] > first + 1]
    free = grid(replace(GIVEN, max_examples=math.inf))
    assert rest == [cell for cell in free if cell[2] > first + 1]


@given(start=GIVENS)
@fast
def test_a_limit_that_allows_no_step_is_named(start):
    if any(grid(start)):
        planning.check_limits(start)
        return
    with pytest.raises(
        ConfigError, match=r"--max-(examples|seconds) \S+ must be enough"
    ) as refused:
        planning.check_limits(start)
    assert "\n" not in str(refused.value)


def test_the_duration_is_that_of_clients_one_after_the_other():
    start = replace(GIVEN, speed=Speed(100.0, 3, seconds_per_round=5.0))
    # Four clients, three at once: two turns of 2 steps of 50 examples at 100 per second.
    assert start.seconds(50, 2, 10) == 10 * (2 * 2 * 50 / 100 + 5)
    assert replace(GIVEN, speed=None).seconds(50, 2, 10) == math.inf


def test_rounds_that_are_too_long_without_any_example_are_not_planned():
    fast_machine = Speed(1e300, 1, seconds_per_round=5.0)  # its examples take no measurable time
    assert not any(grid(replace(GIVEN, speed=fast_machine, max_seconds=1.0)))
    assert any(grid(replace(GIVEN, speed=fast_machine, max_seconds=50.0)))  # ten rounds


def test_a_plan_has_fewer_steps_first_and_reports_its_progress(no_accountant):
    said = []
    found = plan(GIVEN, lambda done, of: said.append((done, of)))
    assert [(each.batch_size, each.steps) for each in found[::3]] == [
        *((100, 40), (50, 80), (25, 160), (12, 320), (6, 640)),
    ]
    assert [each.rounds for each in found[:3]] == [40, 20, 10]
    assert said == [(done, 15) for done in range(15)]
    assert (best(found).batch_size, best(found).rounds) == (100, 10)


def made(**changes) -> Choice:
    values = {
        "batch_size": 10,
        "local_steps": 1,
        "rounds": 40,
        "releases": 40,
        "sampling_rate": 0.1,
        "noise_multiplier": 1.0,
        "own_noise": 1.0,
        "shared_noise": 0.5,
        "noise": 1.0,
        "seconds": math.inf,
    }
    return Choice(**values | changes)


def test_the_best_has_the_least_noise_and_of_equal_ones_the_fewest_rounds_then_examples():
    noisy = made(noise=1.02, rounds=1)
    many = made(noise=1.0)
    few = made(noise=1.009, rounds=10, releases=40)
    cheap = made(noise=1.005, rounds=10, releases=20)
    assert best([noisy, many]) == many
    assert best([noisy, many, few]) == few
    assert best([noisy, many, few, cheap]) == cheap


def test_choices_are_compared_by_the_noise_that_the_run_has(no_accountant):
    own, shared = (choice(replace(GIVEN, shared=share), 50, 1, 40) for share in (False, True))
    assert own.noise == own.own_noise > shared.noise == shared.shared_noise
    assert shared == replace(own, noise=own.shared_noise)


def test_with_the_whole_data_in_every_step_the_fewest_steps_win(monkeypatch):
    """Then z grows as √S, noise over signal stays, and only the cost grows with the steps."""
    monkeypatch.setattr(planning, "_noise_multiplier", lambda e, d, q, steps, past: q * steps**0.5)
    found = plan(replace(GIVEN, max_examples=10**12))
    assert {each.batch_size for each in found} == {1000}
    assert max(each.own_noise for each in found) == pytest.approx(found[0].own_noise)
    assert (best(found).steps, best(found).rounds) == (40, 10)


@pytest.mark.parametrize("rounds", [10**12, 10**400])
def test_an_absurd_number_of_rounds_is_refused_at_once(rounds):
    with pytest.raises(ConfigError, match=r"must be at most 250000 with train\.local-steps=4"):
        choice(GIVEN, 10, 4, rounds)


def test_a_batch_above_the_clients_examples_is_refused():
    with pytest.raises(ConfigError, match=r"train\.batch-size=1001 must be at most 1000"):
        choice(GIVEN, 1001, 1, 1)


def test_too_small_an_epsilon_is_refused_with_its_key():
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=1e-05 must be larger"):
        choice(replace(GIVEN, epsilon=1e-5), 1000, 1, 40)


def test_a_minimum_of_steps_that_no_run_has_is_refused():
    with pytest.raises(ConfigError, match=f"--min-steps {10**12} must be at most 1000000"):
        plan(replace(GIVEN, min_steps=10**12))
