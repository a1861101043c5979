"""Trained and uploaded factors of every method, compared with written-out tables."""

import pytest

from lalora_app.aggregation.average import federated_averaging
from lalora_app.methods import schedule
from lalora_app.methods.compatibility import lookup
from lalora_app.methods.table import METHODS

# Factors of four local steps in rounds 1 and 2, and uploaded factors of rounds 1 to 4.
ALTERNATE_STEPS = ("B A B A", "B A B A")
BOTH = ("AB AB AB AB", "AB AB AB AB")
JOINT = (
    *("dp-lora", "flora", "flexlora", "hetlora", "lora-fair", "lora-fair-cosine", "fedex-lora"),
    *("fedrot-lora", "flat-lora", "lora-plus", "doppler", "dp-fedadamw", "dp-fedadamw-full"),
    *("beamlora", "sd-lora", "duallora", "losa"),
)
NOTHING = ("- - - -", "- - - -")
TABLE = {
    "head-only": (NOTHING, "- - - -"),
    "full": (("W W W W", "W W W W"), "W W W W"),
    "ffa-lora": (("B B B B", "B B B B"), "B B B B"),
    "rolora": (("B B B B", "A A A A"), "B A B A"),
    "la-lora": (ALTERNATE_STEPS, "B A B A"),
    "la-lora-no-filter": (ALTERNATE_STEPS, "B A B A"),
    "la-lora-scaled": (ALTERNATE_STEPS, "B A B A"),
    "la-lora-permuted": (ALTERNATE_STEPS, "B A B A"),
    "la-lora-full": (ALTERNATE_STEPS, "AB AB AB AB"),
    "la-lora-full-no-filter": (ALTERNATE_STEPS, "AB AB AB AB"),
    "la-lora-full-scaled": (ALTERNATE_STEPS, "AB AB AB AB"),
    "la-lora-full-permuted": (ALTERNATE_STEPS, "AB AB AB AB"),
    "rac-lora": (("B B B B", "B B B B"), "B B B B"),
    "rac-lora-a": (("A A A A", "A A A A"), "A A A A"),
    "fedsvd": (("B B B B", "B B B B"), "B B B B"),
    "deer": (("B B B B", "A A A A"), "B A B A"),
    "galore-dwa": (("B B B B", "A A A A"), "B A B A"),
    "fedsa-lora": (BOTH, "A A A A"),
} | {name: (BOTH, "AB AB AB AB") for name in JOINT}
FILTERS = {"la-lora": "binomial", "no-filter": "identity", "scaled": "scaled"}
FILTERS |= {"permuted": "permuted"}


def factors(text: str) -> list[frozenset[str]]:
    return [frozenset(word.strip("-")) for word in text.split()]


def test_the_table_has_every_method():
    assert set(TABLE) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_steps_follow_the_table_and_restart_in_every_round(name):
    odd, even = TABLE[name][0]
    for t in range(1, 7):
        expected = factors(odd if t % 2 == 1 else even)
        assert [METHODS[name].trains(t, k) for k in range(4)] == expected


@pytest.mark.parametrize("name", METHODS)
def test_uploads_follow_the_table(name):
    first_rounds = factors(TABLE[name][1])
    assert [METHODS[name].syncs(t) for t in range(1, 5)] == first_rounds
    assert [METHODS[name].syncs(t) for t in range(5, 9)] == first_rounds


WITH_FACTORS = [name for name in METHODS if name != "head-only"]
ZERO_A = "rac-lora-a"  # its B is random at the start


@pytest.mark.parametrize("name", [name for name in WITH_FACTORS if name != ZERO_A])
def test_the_first_step_trains_b_because_a_has_no_gradient_while_b_is_zero(name):
    first = "W" if METHODS[name].whole else "B"
    assert first in METHODS[name].trains(1, 0)
    assert first in METHODS[name].syncs(1) or first in METHODS[name].finally_syncs


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("local_steps", [2, 3, 6])
def test_a_round_trains_all_that_it_sends_and_the_rest_is_resident(name, local_steps):
    method = METHODS[name]
    for t in range(1, 7):
        trained = set()
        for k in range(local_steps):
            trained |= method.trains(t, k)
        assert schedule.factors_trained_in(method.trains, t, local_steps) == trained
        assert method.syncs(t) <= trained
        assert method.resident(t, local_steps) == trained - method.syncs(t)


def test_only_methods_that_upload_one_of_two_trained_factors_keep_client_state():
    keeping = {name for name, method in METHODS.items() if method.resident(1, 2)}
    controls = {f"la-lora-{control}" for control in ("no-filter", "scaled", "permuted")}
    assert keeping == {"la-lora", "fedsa-lora"} | controls
    assert keeping == {name for name, method in METHODS.items() if method.keeps_client_state}


@pytest.mark.parametrize("name", METHODS)
def test_every_step_trains_a_factor_but_of_the_head_only_baseline(name):
    method = METHODS[name]
    steps = [bool(method.trains(t, k)) for t in range(1, 5) for k in range(6)]
    assert all(steps) if name in WITH_FACTORS else not any(steps)
    assert method.head_only == (name not in WITH_FACTORS)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("la-lora")])
def test_la_lora_variants_differ_by_their_filter_only(name):
    suffix = name.removeprefix("la-lora").removeprefix("-full").removeprefix("-") or "la-lora"
    assert METHODS[name].postprocess.__name__ == FILTERS[suffix]


def test_averaging_is_exact_if_at_most_one_factor_trains_and_none_is_resident():
    for name, method in METHODS.items():
        if method.aggregate is not federated_averaging:  # tested in tests/aggregation/
            continue
        sends_one = all(len(method.syncs(t)) <= 1 for t in (1, 2))
        resident = any(method.resident(t, 2) for t in (1, 2))
        assert method.exact == (sends_one and not resident), name


@pytest.mark.parametrize("name", list(METHODS))
def test_a_schedule_is_periodic_and_accepts_any_number_of_steps(name):
    method = METHODS[name]
    for t in (1, 2, 3):
        for k in range(12):
            assert method.trains(t, k) == method.trains(t, k + schedule.PERIOD)
        assert method.resident(t, 2**63) == method.resident(t, 2 * schedule.PERIOD)
    assert lookup(name, 2**63) is method
