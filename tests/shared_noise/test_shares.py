"""The variance of shared noise, for every admissible pattern of missing and dishonest clients."""

import math
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.settings.errors import ConfigError
from lalora_app.shared_noise.shares import Cohort


@st.composite
def cohorts(draw, most: int = 60) -> Cohort:
    clients = draw(st.integers(2, most))
    threshold = draw(st.integers(2, clients))
    return Cohort(clients, threshold, draw(st.integers(0, threshold - 2)))


@st.composite
def patterns(draw) -> tuple[Cohort, set[int], set[int]]:
    """A cohort, the clients that are missing, and those whose noise the attacker knows."""
    cohort = draw(cohorts())
    everyone = st.integers(0, cohort.clients - 1)
    missing = draw(st.sets(everyone, max_size=cohort.clients - cohort.threshold))
    return cohort, missing, draw(st.sets(everyone, max_size=1 + cohort.colluding))


def left(cohort: Cohort, missing: int) -> Fraction:
    """The variance that one upload keeps after the removal, over σ², component by component."""
    return sum(cohort.fractions[: cohort.needed(missing) + 1], Fraction(0))


@settings(max_examples=200, deadline=None)
@given(pattern=patterns())
def test_the_counted_shares_have_the_promised_variance_whoever_is_missing(pattern):
    cohort, missing, known = pattern
    counted = set(range(cohort.clients)) - missing - known
    assert len(counted) >= cohort.honest
    assert len(counted) * left(cohort, len(missing)) >= 1


@settings(max_examples=100, deadline=None)
@given(cohort=cohorts(), data=st.data())
def test_the_worst_attacker_meets_the_promise_exactly_at_a_level(cohort, data):
    missing = data.draw(st.sampled_from(cohort.levels))
    counted = cohort.clients - missing - 1 - cohort.colluding
    assert counted * left(cohort, missing) == 1
    assert left(cohort, missing) == cohort.share_fraction(missing)


@settings(max_examples=100, deadline=None)
@given(cohort=cohorts())
def test_with_nobody_missing_the_sum_has_n_over_n_minus_1_minus_c(cohort):
    n, c = cohort.clients, cohort.colluding
    assert n * left(cohort, 0) == Fraction(n, n - 1 - c) == cohort.sum_fraction(0)
    most = cohort.most_missing
    assert cohort.threshold * left(cohort, most) == Fraction(cohort.threshold, cohort.honest)
    sums = [(n - d) * left(cohort, d) for d in range(most + 1)]
    assert cohort.most_noise() == max(sums) == max(map(cohort.sum_fraction, range(most + 1)))


@settings(max_examples=100, deadline=None)
@given(cohort=cohorts())
def test_every_component_is_positive_and_there_are_few(cohort):
    most = cohort.most_missing
    assert min(cohort.fractions) > 0
    assert len(cohort.fractions) == cohort.removable + 1 <= 3 + math.log2(max(most, 1))
    assert cohort.needed(most) == cohort.removable
    for d in range(most + 1):
        level = cohort.levels[cohort.needed(d)]
        assert d <= level <= min(max(2 * d - 1, d), most)
    counts = [
        (cohort.honest_if_all_upload - d) * len(cohort.fractions[: cohort.needed(d) + 1])
        for d in range(most + 1)
    ]
    assert cohort.most_summands() == max(counts)


def test_levels_are_powers_of_two_and_the_largest_number_of_missing_clients():
    assert Cohort(100, 67).levels == (0, 1, 2, 4, 8, 16, 32, 33)
    assert Cohort(20, 14).levels == (0, 1, 2, 4, 6)
    assert Cohort(4, 3).levels == (0, 1)
    assert Cohort(4, 4).levels == (0,)


def test_two_answers_for_one_upload_leave_less_than_the_promise():
    cohort = Cohort(20, 14)
    kept = sum(cohort.fractions[: cohort.needed(0) + 1])  # six are missing
    assert cohort.honest * kept == Fraction(13, 19)


def opened_by_lies(clients: int, colluding: int, threshold: int) -> bool:
    """Whether a lying server with 1 + c clients can open a sum that has too little noise.

    It searches all numbers: r clients whose mask key is revealed, x clients whose shares it hands
    to nobody in the sum, and a level of noise that h honest clients reveal. A client counts as
    missing whoever it is told to be lost, and whose shares it did not get. A client names at most
    n - t, never itself, and h honest clients must name each of the r.
    """
    most, honest, needed = clients - threshold, clients - 1 - colluding, threshold - 1 - colluding
    levels = Cohort(clients, threshold, colluding).levels
    for level, x in product(levels, range(most + 1)):
        for r in range(honest - x):
            inside = honest - r - x
            if r + x <= level or inside < 1:
                continue
            if r == 0 and x >= needed:
                return True
            groups = ((inside, x, r), (r, 0, r - 1), (x, 0, r))  # size, already missing, nameable
            for a, b in product(range(min(needed, inside) + 1), range(min(needed, r) + 1)):
                revealing = (a, b, needed - a - b)
                if not 0 <= revealing[2] <= x or (a and level < x):
                    continue
                answers = sum(
                    few * min(level - out, names) + (size - few) * min(most - out, names)
                    for few, (size, out, names) in zip(revealing, groups, strict=True)
                )
                if r and answers >= needed * r:
                    return True
    return False


@pytest.mark.parametrize("colluding", [0, 1, 3])
@pytest.mark.parametrize("clients", [*range(2, 17), 20, 24])
def test_the_threshold_is_the_smallest_that_lies_cannot_get_around(clients, colluding):
    if colluding > clients - 2:
        pytest.skip("so many colluding clients are refused")
    threshold = Cohort.of(clients, colluding).threshold
    assert not opened_by_lies(clients, colluding, threshold)
    if threshold > 2 + colluding:
        assert opened_by_lies(clients, colluding, threshold - 1)


@settings(max_examples=200, deadline=None)
@given(clients=st.integers(2, 300), data=st.data())
def test_no_two_sets_of_threshold_many_clients_are_all_dishonest_where_they_meet(clients, data):
    colluding = data.draw(st.integers(0, clients - 2))
    cohort = Cohort.of(clients, colluding)
    assert 2 * cohort.threshold - clients > 1 + colluding  # the attacker and its helpers
    assert cohort.threshold >= Fraction(2 * clients, 3)
    assert cohort.most_missing**2 < cohort.honest


def test_thresholds_of_worked_examples():
    missing = {n: Cohort.of(n).most_missing for n in (2, 3, 4, 8, 20, 30, 100)}
    assert missing == {2: 0, 3: 0, 4: 1, 8: 2, 20: 3, 30: 4, 100: 9}
    assert Cohort.of(20, 4).most_missing == 3


@pytest.mark.parametrize(("clients", "colluding"), [(4, 3), (4, -1), (1, 0), (2, 1)])
def test_as_many_colluding_clients_as_leave_nobody_are_refused(clients, colluding):
    with pytest.raises(ConfigError, match=rf"privacy\.colluding={colluding} must be from 0 to"):
        Cohort.of(clients, colluding)


@settings(max_examples=100, deadline=None)
@given(cohort=cohorts())
def test_an_upload_alone_keeps_what_the_fewest_components_give(cohort):
    fewest = min(left(cohort, missing) for missing in range(cohort.most_missing + 1))
    assert cohort.alone(3.0) == pytest.approx(3.0 * math.sqrt(fewest))
    assert Cohort(2, 2).alone(3.0) == 3.0
    assert cohort.alone(0.0) == 0


def test_numbers_of_a_worked_example():
    assert Cohort(4, 3).fractions == (Fraction(1, 3), Fraction(1, 6))  # 1/3 + 1/6 = 1/2
    assert Cohort(4, 3).sum_fraction(0) == Fraction(4, 3)
    assert Cohort(4, 3).sum_fraction(1) == Fraction(3, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 5, 0), "threshold=5 must be from 1 to the 4 clients"),
        ((4, 3, 2), "colluding=2 must be from 0 to 1"),
        ((4, 3, -1), "colluding=-1 must be from 0 to 1"),
        ((2, 1, 0), "colluding=0 must be from 0 to -1"),
    ],
)
def test_a_cohort_without_a_share_to_count_on_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Cohort(*arguments)


@pytest.mark.parametrize("missing", [-1, 2])
def test_more_missing_than_the_threshold_allows_is_an_error(missing):
    with pytest.raises(ValueError, match=f"missing={missing} must be from 0 to 1"):
        Cohort(4, 3).needed(missing)
