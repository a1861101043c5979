"""The two ε of shared noise in the ledger: both limits hold, before anything is written."""

import math
import shutil
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers.shared_accounting  # noqa: F401
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.budget import BudgetError, Limit
from lalora_app.privacy.ledger import Ledger
from lalora_app.privacy.ledger_entries import SCHEMA, releases_alone, releases_of, share_noise
from lalora_app.shared_noise.shares import Cohort

DELTA = 1e-5
NO_LIMIT = Limit(math.inf, DELTA)
SUM = Release(0.1, 6.0, 1)
OPENED = replace(SUM, noise_multiplier=3.0)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def reserve(ledger, release=SUM, alone=3.0, planned=1, dataset="data", run="run", **limits):
    limits = {"run_limit": NO_LIMIT, "node_limit": NO_LIMIT} | limits
    return ledger.reserve(dataset, run, 1, release, planned=planned, alone=alone, **limits)


def spent(*releases) -> float:
    return epsilon(releases, DELTA)


def column(ledger) -> list[float | None]:
    """Read by a connection of our own, not by the module under test."""
    connection = sqlite3.connect(ledger.path)
    try:
        rows = connection.execute("SELECT alone_multiplier FROM releases ORDER BY id").fetchall()
    finally:
        connection.close()
    return [value for (value,) in rows]


def test_a_name_is_used_for_one_release(ledger):
    reserve(ledger, uid="keys of attempt 1")
    reserve(ledger, uid="keys of attempt 2")
    with pytest.raises(BudgetError, match="its keys are used"):
        reserve(ledger, uid="keys of attempt 1")
    assert [entry.uid[-1] for entry in ledger.entries()] == ["1", "2"]


def test_the_file_holds_both_multipliers_and_none_for_own_noise(ledger):
    reservation = reserve(ledger)
    reserve(ledger, alone=None)
    assert column(ledger) == [3.0, None]
    assert reservation.noise_multiplier == 6.0  # the private step shares the noise of the sum
    entries = ledger.entries()
    assert [entry.alone for entry in entries] == [3.0, None]
    assert releases_of(entries) == ledger.releases("data") == [SUM, SUM]
    assert releases_alone(entries) == [OPENED, SUM]
    assert share_noise(entries)
    assert not share_noise(entries[1:])


def test_the_limit_alone_holds_over_all_runs_each_release_with_its_own_noise(ledger):
    own = Release(0.1, 2.0, 4)
    limit = Limit(spent(own, OPENED, OPENED), DELTA)
    reserve(ledger, own, alone=None, run="one", alone_limit=limit)
    reserve(ledger, run="two", alone_limit=limit)
    reserve(ledger, run="three", alone_limit=limit)
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetError, match=r"the node's epsilon-alone would be .* at most"):
        reserve(ledger, run="four", alone_limit=limit)
    with pytest.raises(BudgetError, match="epsilon-alone"):
        reserve(ledger, own, alone=None, run="five", alone_limit=limit)
    assert ledger.path.read_bytes() == before
    reserve(ledger, dataset="other", alone_limit=limit)


@pytest.mark.parametrize("whose", ["run", "node"])
def test_the_limits_of_the_sums_hold_beside_it_and_the_text_names_which(ledger, whose):
    limit = {f"{whose}_limit": Limit(spent(SUM), DELTA), "alone_limit": NO_LIMIT}
    reserve(ledger, **limit)  # alone it costs more than this limit, which is that of the sums
    assert spent(OPENED) > limit[f"{whose}_limit"].epsilon
    with pytest.raises(BudgetError, match=f"the {whose}'s epsilon would be"):
        reserve(ledger, **limit)
    assert column(ledger) == [3.0]


def test_a_run_that_would_exceed_the_limit_alone_later_is_refused_at_its_first_round(ledger):
    limit = Limit(spent(replace(OPENED, count=9)), DELTA)
    for planned in (10, 100):
        with pytest.raises(BudgetError, match="epsilon-alone"):
            reserve(ledger, planned=planned, alone_limit=limit)
    assert column(ledger) == []
    reserve(ledger, planned=9, alone_limit=limit)


def test_releases_that_are_planned_later_count_with_their_own_noise(ledger):
    later = [Release(1.0, 5.0, 1)]
    limit = Limit(spent(OPENED, *later), DELTA)
    reserve(ledger, later=later, alone_limit=limit)
    with pytest.raises(BudgetError, match="epsilon-alone"):
        reserve(ledger, dataset="b", later=[Release(1.0, 4.0, 1)], alone_limit=limit)


@pytest.mark.parametrize("alone", [6.1, -0.1, math.nan])
def test_an_upload_has_no_more_noise_than_its_sum(ledger, alone):
    with pytest.raises(ValueError, match="noise multiplier 6"):
        reserve(ledger, alone=alone)
    assert column(ledger) == []


def test_the_limit_cases_are_equal_noise_and_no_noise(ledger):
    reserve(ledger, alone=6.0, alone_limit=Limit(spent(SUM), DELTA))
    with pytest.raises(BudgetError, match="epsilon-alone"):
        reserve(ledger, Release(0.1, 6.0, 1), alone=0.0, alone_limit=Limit(1e6, DELTA))
    reserve(ledger, alone=0.0, alone_limit=NO_LIMIT)
    assert math.isinf(epsilon(releases_alone(ledger.entries()), DELTA))


@pytest.mark.parametrize("without", [["alone_multiplier"], ["uid", "alone_multiplier"]])
def test_a_ledger_from_before_shared_noise_keeps_every_line_as_own_noise(tmp_path, without):
    path, schema = tmp_path / "old.sqlite", SCHEMA
    for name, kind in (("uid", "TEXT"), ("alone_multiplier", "REAL")):
        schema = schema.replace(f",\n    {name} {kind}", "") if name in without else schema
    db = sqlite3.connect(path)
    db.executescript(schema)
    columns = "time, dataset, run, round, sampling_rate, noise_multiplier, count"
    row = ("2026-01-01T00:00:00+00:00", "data", "run", 1, 0.1, 1.5, 4)
    db.execute(f"INSERT INTO releases ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    db.commit()
    assert all(
        name not in str(db.execute("PRAGMA table_info(releases)").fetchall()) for name in without
    )
    db.close()
    old = Release(0.1, 1.5, 4)
    ledger = Ledger(path)
    assert ledger.releases("data") == releases_alone(ledger.entries()) == [old]
    reserve(ledger)
    assert column(Ledger(path)) == [None, 3.0]


def test_merging_keeps_both_multipliers(ledger, tmp_path):
    reserve(ledger)
    copy = Ledger(shutil.copy(ledger.path, tmp_path / "copy.sqlite"))
    reserve(copy, alone=2.0)
    reserve(copy, alone=None)
    assert [entry.alone for entry in ledger.merge(copy)] == [2.0, None]
    assert column(ledger) == [3.0, 2.0, None]
    assert ledger.entries() == copy.entries()


@given(
    z=st.floats(2.0, 20.0),
    cohort=st.builds(Cohort, st.just(20), st.integers(14, 20), st.integers(0, 5)),
    rounds=st.integers(1, 3),
)
@settings(deadline=None, max_examples=10, derandomize=True)
def test_the_ledger_counts_the_noise_of_an_opened_upload(tmp_path_factory, z, cohort, rounds):
    ledger = Ledger(tmp_path_factory.mktemp("promise") / "ledger.sqlite")
    release = Release(0.02, z, 1)
    for _ in range(rounds):
        reserve(ledger, release, cohort.alone(z))
    found = epsilon(releases_alone(ledger.entries()), DELTA)
    opened = Release(0.02, z / math.sqrt(19 - cohort.colluding), 1)
    assert found == pytest.approx(epsilon([opened] * rounds, DELTA), rel=1e-9)
    assert found > epsilon(releases_of(ledger.entries()), DELTA)
