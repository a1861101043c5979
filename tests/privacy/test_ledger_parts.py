"""Parts of a dataset in the ledger: the ε of a dataset is that of its worst example."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.older_ledgers import write_older
from lalora_app.privacy import ledger_entries
from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.privacy.budget import BudgetError, Limit
from lalora_app.privacy.ledger import Ledger
from lalora_app.privacy.ledger_entries import (
    WHOLE,
    LedgerEntry,
    compositions,
    may_share,
    parts_of,
    worst_releases,
)

DELTA = 1e-5
ONE = Release(0.1, 1.5, 4)
PARTS = [WHOLE, "one/1", "one/2", "one/3", "two/1", "two/2"]


def line(part: str, number: int = 0, release: Release = ONE) -> LedgerEntry:
    return LedgerEntry("", "data", "run", number, release, str(number), part=part)


def reserve(ledger: Ledger, part: str, release: Release = ONE, limit=math.inf, run="run"):
    limits = {"run_limit": Limit(limit, DELTA), "node_limit": Limit(math.inf, DELTA)}
    return ledger.reserve("data", run, 1, release, planned=release.count, **limits, part=part)


def lines_of_examples(entries, part):
    """The lines that each kind of example is in: one part of each division, by brute force."""
    divisions = [["one/1", "one/2", "one/3", "one/none"], ["two/1", "two/2", "two/none"]]
    kinds = [set(kind) for kind in product(*divisions)]
    kinds = [kind for kind in kinds if part in (WHOLE, *kind)]
    return [frozenset(e.uid for e in entries if e.part in (WHOLE, *kind)) for kind in kinds]


@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=8),
    part=st.sampled_from(PARTS),
)
def test_one_of_the_lists_holds_all_lines_of_every_example(parts, part):
    entries = [line(own, number) for number, own in enumerate(parts)]
    found = [frozenset(e.uid for e in lines) for lines in compositions(entries, part)]
    for lines in lines_of_examples(entries, part):
        assert any(lines <= other for other in found)


@given(st.lists(st.sampled_from([WHOLE, "one/1", "one/2", "one/3"]), max_size=8))
def test_with_one_division_the_lists_are_those_of_its_examples(parts):
    entries = [line(own, number) for number, own in enumerate(parts)]
    found = {frozenset(e.uid for e in lines) for lines in compositions(entries)}
    assert found <= set(lines_of_examples(entries, WHOLE))
    for own in set(parts) - {WHOLE}:
        (lines,) = compositions(entries, own)
        assert {e.part for e in lines} <= {WHOLE, own}


@given(st.sampled_from(PARTS), st.sampled_from(PARTS))
def test_parts_are_disjoint_only_within_one_division(one, other):
    disjoint = one != other and one[:3] == other[:3] and WHOLE not in (one, other)
    assert may_share(one, other) == may_share(other, one) == (not disjoint)


def test_with_very_many_parts_all_lines_count(monkeypatch):
    entries = [line(part, number) for number, part in enumerate(PARTS)]
    monkeypatch.setattr(ledger_entries, "_MOST_LISTS", 1)
    assert compositions(entries) == [entries]
    monkeypatch.setattr(ledger_entries, "_MOST_LISTS", 2)  # enough for the second division
    assert [[e.part for e in lines] for lines in compositions(entries)] == [
        [part for part in PARTS if part != other] for other in ("two/2", "two/1")
    ]


def test_very_many_divisions_need_no_more_than_64_lists():
    entries = [
        line(f"{division}/{part}", 2 * division) for division in range(40) for part in (1, 2)
    ]
    assert len(compositions(entries)) == 64
    assert len(compositions(entries, "0/1")) == 64
    assert len(compositions(entries[:4], "0/1")) == 2


def test_a_part_of_each_division_is_told_with_all_lines_that_its_examples_can_be_in():
    entries = [line(part, number) for number, part in enumerate(PARTS)]
    found = [{e.part for e in lines} for lines in compositions(entries, "one/2")]
    assert found == [{WHOLE, "one/2", f"two/{number}"} for number in (1, 2)]
    found = [{e.part for e in lines} for lines in compositions(entries, "two/1")]
    assert found == [{WHOLE, f"one/{number}", "two/1"} for number in (1, 2, 3)]
    assert parts_of(entries) == PARTS[1:]
    assert parts_of([line(WHOLE)]) == []


@given(st.lists(st.sampled_from(PARTS), max_size=8), st.sampled_from(PARTS))
def test_no_part_has_more_releases_than_the_dataset(parts, part):
    entries = [line(own, number) for number, own in enumerate(parts)]
    all_lists = [frozenset(e.uid for e in lines) for lines in compositions(entries)]
    for lines in compositions(entries, part):
        assert any({e.uid for e in lines} <= other for other in all_lists)


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8))
def test_the_dataset_has_the_largest_epsilon_of_its_parts(parts):
    entries = [line(own, number) for number, own in enumerate(parts)]
    whole = sum(release.count for release in worst_releases(entries, DELTA))
    worst = [worst_releases(entries, DELTA, part=part) for part in parts_of(entries)]
    found = [sum(release.count for release in releases) for releases in worst]
    assert whole == max(found, default=ONE.count * len(entries))


def test_epsilon_is_that_of_the_worst_part(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    small, large, whole = Release(0.1, 3.0, 4), Release(0.1, 1.0, 4), Release(0.1, 2.0, 2)
    for part, release in (("one/1", small), ("one/2", large), (WHOLE, whole)):
        reserve(ledger, part, release)
    entries = ledger.entries("data")
    assert [entry.part for entry in entries] == ["one/1", "one/2", WHOLE]
    spent = epsilon(worst_releases(entries, DELTA), DELTA)
    assert spent == epsilon([large, whole], DELTA) < epsilon([small, large, whole], DELTA)


def test_each_part_may_spend_the_whole_limit_and_no_part_more(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    limit = 1.0
    noise = calibrate(limit, DELTA, sampling_rate=0.1, steps=4)
    spend = Release(0.1, noise, 4)
    reserve(ledger, "one/1", spend, limit)
    reserve(ledger, "one/2", spend, limit)
    for part in ("one/1", "one/2", WHOLE, "two/1"):  # each holds examples that have spent it
        with pytest.raises(BudgetError, match="the run's epsilon would be"):
            reserve(ledger, part, spend, limit)
    reserve(ledger, "one/3", spend, limit)


def test_the_limit_of_a_node_counts_its_worst_part_over_all_runs(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    most = epsilon([ONE, ONE], DELTA) + 1e-6
    node = {"run_limit": Limit(math.inf, DELTA), "node_limit": Limit(most, DELTA)}
    for run, part in (("a", "one/1"), ("b", "one/2"), ("c", "one/1")):
        ledger.reserve("data", run, 1, ONE, planned=ONE.count, **node, part=part)
    for part in ("one/1", WHOLE, "two/2"):
        with pytest.raises(BudgetError, match="the node's epsilon would be"):
            ledger.reserve("data", "d", 1, ONE, planned=ONE.count, **node, part=part)
    ledger.reserve("data", "d", 1, ONE, planned=ONE.count, **node, part="one/2")


def test_a_run_that_was_accepted_is_accepted_to_its_end_within_the_limit(tmp_path):
    """Divisions take turns in having most lines; the limit holds for the dataset at each step."""
    ledger, step = Ledger(tmp_path / "ledger.sqlite"), Release(0.1, 1.5, 1)
    most = epsilon([step] * 6, DELTA) + 1e-6
    node = {"run_limit": Limit(math.inf, DELTA), "node_limit": Limit(most, DELTA)}
    for run, rounds in (("one", 2), ("two", 4)):
        for part in (1, 2):
            for left in range(rounds, 0, -1):
                ledger.reserve("data", run, 1, step, planned=left, **node, part=f"{run}/{part}")
                spent = epsilon(worst_releases(ledger.entries(), DELTA), DELTA)
                assert spent <= most
    for part in ("one/1", "two/2", WHOLE):
        with pytest.raises(BudgetError, match="the node's epsilon would be"):
            ledger.reserve("data", "more", 1, step, planned=1, **node, part=part)


def test_an_older_ledger_counts_its_lines_for_all_examples(tmp_path):
    path = tmp_path / "ledger.sqlite"
    write_older(path, "part TEXT", "seeded INTEGER")
    reserve(Ledger(path), "one/1")
    assert [entry.part for entry in Ledger(path).entries()] == [WHOLE, "one/1"]
    worst = worst_releases(Ledger(path).entries(), DELTA)
    assert worst == [ONE, ONE]


def test_a_merge_keeps_the_parts(tmp_path):
    one, other = (Ledger(tmp_path / name / "ledger.sqlite") for name in ("one", "other"))
    reserve(other, "one/2")
    assert one.merge(other)[0].part == "one/2"
    assert one.entries() == other.entries()
