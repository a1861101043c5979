"""Balanced participation: laws that every plan obeys."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.server.cohorts import plan_cohorts


@st.composite
def plans(draw):
    clients = draw(st.integers(1, 20))
    return {
        "clients": clients,
        "per_round": draw(st.integers(1, clients)),
        "rounds": draw(st.integers(1, 30)),
        "seed": draw(st.integers(0, 2**64)),
    }


@given(arguments=plans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cohorts_are_balanced_sorted_and_without_duplicates(arguments):
    cohorts = plan_cohorts(**arguments)
    clients, per_round = arguments["clients"], arguments["per_round"]
    assert len(cohorts) == arguments["rounds"]
    for cohort in cohorts:
        assert len(set(cohort)) == per_round
        assert list(cohort) == sorted(cohort)
        assert set(cohort) <= set(range(clients))
    taken = Counter(client for cohort in cohorts for client in cohort)
    fewest = arguments["rounds"] * per_round // clients
    assert {taken[client] - fewest for client in range(clients)} <= {0, 1}


@given(arguments=plans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_every_prefix_is_balanced_too_so_an_early_end_is_fair(arguments):
    cohorts = plan_cohorts(**arguments)
    taken: Counter[int] = Counter({client: 0 for client in range(arguments["clients"])})
    for cohort in cohorts:
        taken.update(cohort)
        assert max(taken.values()) - min(taken.values()) <= 1


@given(arguments=plans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_plan_follows_from_its_arguments(arguments):
    assert plan_cohorts(**arguments) == plan_cohorts(**arguments)


@pytest.mark.parametrize("clients", [1, 2, 7])
def test_everyone_is_asked_when_a_round_asks_for_all(clients):
    assert plan_cohorts(clients, clients, 5, seed=3) == [tuple(range(clients))] * 5


def test_another_seed_gives_another_plan():
    assert plan_cohorts(20, 5, 10, seed=0) != plan_cohorts(20, 5, 10, seed=1)


def test_ties_are_broken_at_random_and_not_by_index():
    first = Counter(plan_cohorts(10, 1, 1, seed=seed)[0][0] for seed in range(500))
    # Each client leads about 50 of 500 plans; 20 is more than four standard deviations off.
    assert all(20 < first[client] < 80 for client in range(10))
