"""The ledger: committed before it is drawn, never above a limit, whatever is killed or races."""

import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers.shared_accounting  # noqa: F401
from conftest import ROOT
from lalora_app.privacy import accounting
from lalora_app.privacy import budget as book
from lalora_app.privacy import ledger as book_file
from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.privacy.budget import BudgetError, Limit, first_release, noise_for
from lalora_app.privacy.ledger import Ledger, Reservation
from lalora_app.privacy.ledger_entries import SCHEMA

DELTA = 1e-5


class Clock(datetime):
    """A clock that stands where a test puts it."""

    moment = datetime(2026, 11, 24, 12, tzinfo=UTC)

    @classmethod
    def now(cls, tz=None):
        return cls.moment


NO_LIMIT = Limit(math.inf, DELTA)
ROUND = Release(sampling_rate=0.1, noise_multiplier=1.5, count=4)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "deep" / "ledger.sqlite")


def reserve(ledger: Ledger, **changes) -> Reservation:
    order = {
        "dataset": "data",
        "run": "run",
        "round_": 1,
        "release": ROUND,
        "run_limit": NO_LIMIT,
        "node_limit": NO_LIMIT,
    } | changes
    order.setdefault("planned", order["release"].count)
    return ledger.reserve(
        order.pop("dataset"), order.pop("run"), order.pop("round_"), order.pop("release"), **order
    )


def raw_rows(path: Path) -> list[tuple]:
    """Read by a connection of our own, not by the module under test."""
    connection = sqlite3.connect(path)
    try:
        columns = "dataset, run, round, sampling_rate, noise_multiplier, count"
        return connection.execute(f"SELECT {columns} FROM releases ORDER BY id").fetchall()
    finally:
        connection.close()


def epsilon_of(*releases: Release) -> float:
    return epsilon(releases, DELTA)


def test_a_row_is_committed_when_reserve_returns(ledger):
    reservation = reserve(ledger, round_=7)
    assert raw_rows(ledger.path) == [("data", "run", 7, 0.1, 1.5, 4)]
    assert (reservation.sampling_rate, reservation.noise_multiplier) == (0.1, 1.5)


def test_a_reservation_is_used_up_after_as_many_draws_as_were_counted(ledger):
    reservation = reserve(ledger, release=Release(0.1, 1.5, 2))
    reservation.take()
    reservation.take()
    with pytest.raises(BudgetError):
        reservation.take()
    with pytest.raises(BudgetError):
        reservation.take()


def test_a_second_ledger_on_the_file_sees_and_keeps_what_the_first_wrote(ledger):
    reserve(ledger, run="one")
    again = Ledger(ledger.path)
    reserve(again, run="two")
    assert [entry.run for entry in ledger.entries()] == ["one", "two"]
    assert ledger.releases("data", "one") == [ROUND]
    assert ledger.releases("data") == [ROUND, ROUND]
    assert ledger.releases("other") == []
    assert ledger.releases("data", "three") == []


@pytest.mark.parametrize("whose", ["run", "node"])
def test_a_refusal_names_the_limit_and_leaves_the_file_as_it_was(ledger, whose):
    reserve(ledger)
    before = ledger.path.read_bytes()
    too_low = Limit(0.9 * epsilon_of(ROUND, ROUND), DELTA)
    with pytest.raises(BudgetError, match=f"the {whose}'s epsilon"):
        reserve(ledger, **{f"{whose}_limit": too_low})
    assert ledger.path.read_bytes() == before
    assert len(raw_rows(ledger.path)) == 1


@pytest.mark.parametrize("whose", ["run", "node"])
def test_a_limit_may_be_used_up_to_itself(ledger, whose):
    exactly = {f"{whose}_limit": Limit(epsilon_of(ROUND, ROUND), DELTA)}
    reserve(ledger, **exactly)
    reserve(ledger, **exactly)
    with pytest.raises(BudgetError):
        reserve(ledger, **exactly)
    assert len(raw_rows(ledger.path)) == 2


def test_the_node_limit_composes_over_runs_and_the_run_limit_does_not(ledger):
    limit = Limit(epsilon_of(ROUND), DELTA)
    reserve(ledger, run="one", run_limit=limit)
    reserve(ledger, run="two", run_limit=limit)
    with pytest.raises(BudgetError, match="node"):
        reserve(ledger, run="three", run_limit=limit, node_limit=limit)
    assert {row[1] for row in raw_rows(ledger.path)} == {"one", "two"}


def test_every_dataset_has_its_own_lifetime(ledger):
    limit = Limit(epsilon_of(ROUND), DELTA)
    for dataset in ("one", "two", "three"):
        reserve(ledger, dataset=dataset, run_limit=limit, node_limit=limit)
    with pytest.raises(BudgetError):
        reserve(ledger, dataset="two", run="later", run_limit=limit, node_limit=limit)


@pytest.mark.parametrize("whose", ["run", "node"])
def test_a_run_that_cannot_end_is_refused_at_its_first_round(ledger, whose):
    plan = 5 * ROUND.count
    for_four = epsilon_of(Release(ROUND.sampling_rate, ROUND.noise_multiplier, 4 * ROUND.count))
    limit = {f"{whose}_limit": Limit(for_four, DELTA)}
    with pytest.raises(BudgetError):
        reserve(ledger, planned=plan, **limit)
    assert raw_rows(ledger.path) == []
    reserve(ledger, planned=plan - ROUND.count, **limit)


def test_a_plan_smaller_than_the_release_does_not_get_past_a_limit(ledger):
    with pytest.raises(BudgetError):
        reserve(ledger, planned=1, node_limit=Limit(0.9 * epsilon_of(ROUND), DELTA))


def test_a_release_without_noise_needs_an_infinite_limit(ledger):
    bare = Release(0.1, 0.0, 1)
    reserve(ledger, release=bare)
    with pytest.raises(BudgetError):
        reserve(ledger, dataset="other", release=bare, node_limit=Limit(1e6, DELTA))


def test_noise_stays_constant_while_all_goes_as_planned():
    limit, q, steps, rounds = Limit(2.0, DELTA), 0.1, 3, 3
    past: list[Release] = []
    used = []
    for left in range(rounds, 0, -1):
        used.append(noise_for(past, limit, sampling_rate=q, steps=left * steps))
        past.append(Release(q, used[-1], steps))
    assert used == [calibrate(2.0, DELTA, sampling_rate=q, steps=rounds * steps)] * rounds
    assert 0.98 * 2 <= epsilon_of(*past) <= 2


def quick_epsilon(releases, delta) -> float:
    """A stand-in that is fast and can be solved by hand: ε² = Σ count · (q/z)²."""
    terms = [r.count * (r.sampling_rate / (r.noise_multiplier or 1e-9)) ** 2 for r in releases]
    return math.sqrt(sum(terms))


@pytest.fixture
def quick_books(monkeypatch):
    monkeypatch.setattr(accounting, "epsilon", quick_epsilon)
    monkeypatch.setattr(book, "epsilon", quick_epsilon)


def test_a_day_holds_so_many_rounds_of_a_dataset_and_the_next_day_as_many(ledger, monkeypatch):
    monkeypatch.setattr(book_file, "datetime", Clock)
    for round_ in (1, 2):
        reserve(ledger, round_=round_, per_day=2)
    with pytest.raises(BudgetError, match="2 rounds in 24 hours; max-rounds-per-day=2"):
        reserve(ledger, per_day=2)
    reserve(ledger, dataset="another", per_day=2)
    monkeypatch.setattr(Clock, "moment", Clock.moment + timedelta(hours=25))
    reserve(ledger, round_=3, per_day=2)
    assert len(raw_rows(ledger.path)) == 4


def test_a_run_holds_so_many_rounds_of_a_dataset_however_they_are_numbered(ledger):
    for _ in range(2):
        reserve(ledger, max_rounds=2)
    with pytest.raises(BudgetError, match="2 rounds of this run; max-rounds=2"):
        reserve(ledger, max_rounds=2)
    reserve(ledger, dataset="another", max_rounds=2)
    reserve(ledger, run="another", max_rounds=2)
    assert len(raw_rows(ledger.path)) == 4


def test_a_clock_that_is_set_back_makes_a_client_wait_and_nothing_else(ledger, monkeypatch):
    monkeypatch.setattr(book_file, "datetime", Clock)
    reserve(ledger, per_day=1)
    monkeypatch.setattr(Clock, "moment", Clock.moment - timedelta(days=400))
    with pytest.raises(BudgetError, match="1 rounds in 24 hours"):
        reserve(ledger, per_day=1)
    before = epsilon_of(*ledger.releases("data"))
    reserve(ledger, round_=2)  # a node without such a limit goes on, and its sum only grows
    assert epsilon_of(*ledger.releases("data")) > before
    assert [row[2] for row in raw_rows(ledger.path)] == [1, 2]


# --- copies and old files ---------------------------------------------------------------------


def test_merging_adds_what_is_missing_and_counts_nothing_twice(ledger, tmp_path):
    reserve(ledger)
    copy = tmp_path / "copy.sqlite"
    shutil.copy(ledger.path, copy)
    other = Ledger(copy)
    reserve(other)  # looks exactly like a line that both have, and is another release
    reserve(ledger, round_=2)
    assert [entry.round for entry in ledger.merge(other)] == [1]
    assert sorted(row[2] for row in raw_rows(ledger.path)) == [1, 1, 2]
    assert ledger.merge(other) == []
    assert other.merge(ledger) != []
    assert {e.uid for e in ledger.entries()} == {e.uid for e in other.entries()}


def test_a_ledger_from_before_lines_had_names_keeps_every_line(tmp_path):
    path = tmp_path / "old.sqlite"
    db = sqlite3.connect(path)
    db.executescript(SCHEMA.replace(",\n    uid TEXT", ""))
    row = ("2026-01-01T00:00:00+00:00", "data", "run", 1, 0.1, 1.5, 4)
    db.executemany(
        "INSERT INTO releases (time, dataset, run, round, sampling_rate, noise_multiplier, count) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [row, row],
    )
    db.commit()
    db.close()
    ledger = Ledger(path)
    assert len({entry.uid for entry in ledger.entries()}) == 2
    reserve(ledger)
    assert Ledger(path).releases("data") == [Release(0.1, 1.5, 4)] * 2 + [ROUND]


@pytest.mark.parametrize("page", [1, 2])
def test_a_damaged_file_is_told(ledger, page):
    reserve(ledger)
    assert ledger.damage() == ""
    data = bytearray(ledger.path.read_bytes())
    data[4096 * page + 2 : 4096 * (page + 1)] = bytes(4094)
    ledger.path.write_bytes(data)
    assert ledger.damage()


@pytest.mark.usefixtures("quick_books")
def test_lost_releases_are_paid_for_by_noise_and_not_by_epsilon():
    limit, q = Limit(2.0, DELTA), 0.1
    planned = noise_for([], limit, sampling_rate=q, steps=6)
    assert planned == pytest.approx(q * math.sqrt(6) / 2, rel=2e-3)
    lost = [Release(q, planned, 3)]  # of a round that is now asked for again
    more = noise_for(lost, limit, sampling_rate=q, steps=6)
    left = 2**2 - 3 * (q / planned) ** 2
    assert more == pytest.approx(q * math.sqrt(6 / left), rel=2e-3)
    assert more > 1.3 * planned
    assert quick_epsilon([*lost, Release(q, more, 6)], DELTA) <= 2


@pytest.mark.usefixtures("quick_books")
def test_noise_once_raised_stays_where_it_is():
    limit, q = Limit(2.0, DELTA), 0.1
    lost = [Release(q, noise_for([], limit, sampling_rate=q, steps=6), 3)]
    more = noise_for(lost, limit, sampling_rate=q, steps=6)
    assert noise_for([*lost, Release(q, more, 3)], limit, sampling_rate=q, steps=3) == more


@pytest.mark.usefixtures("quick_books")
def test_another_sampling_rate_is_calibrated_anew():
    past = [Release(0.1, 3.0, 3)]
    changed = noise_for(past, Limit(2.0, DELTA), sampling_rate=0.2, steps=3)
    left = 2**2 - 3 * (0.1 / 3.0) ** 2
    assert changed == pytest.approx(0.2 * math.sqrt(3 / left), rel=2e-3)


@pytest.mark.usefixtures("quick_books")
@pytest.mark.parametrize("z", [0.0, 0.5])
def test_nothing_left_is_a_budget_error(z):
    past = [Release(0.3, z, 2)]
    assert quick_epsilon(past, DELTA) > 0.5
    with pytest.raises(BudgetError, match="leave nothing"):
        noise_for(past, Limit(0.5, DELTA), sampling_rate=0.3, steps=1)


def test_no_promise_no_noise():
    assert noise_for([], NO_LIMIT, sampling_rate=0.1, steps=5) == 0
    assert noise_for([Release(0.1, 0.0, 5)], NO_LIMIT, sampling_rate=0.1, steps=5) == 0


# The accountant is replaced by a count that takes its time: what is tested is the transaction.
RACER = """
import sys, time
from pathlib import Path
from lalora_app.privacy import budget as book
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import BudgetError, Limit
from lalora_app.privacy.ledger import Ledger

def slow_count(releases, delta):
    time.sleep(0.005)
    return float(sum(release.count for release in releases))

book.epsilon = slow_count
path, run, gate, most = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])
Path(f"{gate}.{run}").touch()
while not gate.exists():
    time.sleep(0.002)
ledger, won = Ledger(path), 0
while True:
    limits = {"run_limit": Limit(1e9, 1e-5), "node_limit": Limit(most, 1e-5)}
    try:
        ledger.reserve("data", run, won, Release(0.1, 1.0, 3), planned=3, **limits)
    except BudgetError:
        break
    won += 1
    time.sleep(0.03)  # SQLite's waiting process sleeps: let it have its turn
print(won)
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def wait_for(done, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_processes_that_race_for_the_node_limit_never_overspend_it(tmp_path):
    path, gate, most = tmp_path / "ledger.sqlite", tmp_path / "gate", 62
    racers = [start(RACER, path, f"run{i}", gate, most) for i in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("gate.*"))) == 2)
    gate.touch()  # both make the file and race from its first row on
    won = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    counts = [row[5] for row in raw_rows(path)]
    assert sum(counts) == 60  # 20 releases of 3; a 21st would make 63
    assert sum(won) == len(counts)
    assert all(won)


VICTIM = """
import os, sys
from pathlib import Path
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.ledger import Ledger

ledger, run = Ledger(Path(sys.argv[1])), sys.argv[2]
drawn = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
none = Limit(float("inf"), 1e-5)
for round_ in range(10**9):
    ledger.reserve(
        "data", run, round_, Release(0.1, 1.0, 1), planned=1, run_limit=none, node_limit=none
    )
    os.write(drawn, f"{run} {round_}\\n".encode())
    os.fsync(drawn)
"""


@pytest.mark.slow
@pytest.mark.quiet
def test_a_client_killed_at_any_moment_has_drawn_nothing_that_is_not_written(tmp_path):
    path, drawn = tmp_path / "ledger.sqlite", tmp_path / "drawn"
    drawn.touch()
    moments = random.Random(0)
    for kill in range(20):
        run = f"run{kill}"
        victim = start(VICTIM, path, run, drawn)
        wait_for(lambda run=run: f"{run} " in drawn.read_text())
        time.sleep(moments.uniform(0, 0.1))
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(timeout=60) == -signal.SIGKILL
        victim.stdout.close()
        lines = [line.split() for line in drawn.read_text().splitlines()]
        rows = {(row[1], str(row[2])) for row in raw_rows(path)}
        assert {tuple(line) for line in lines} <= rows
        assert len(rows) <= len(lines) + kill + 1  # at most one a kill was written in vain
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@given(share=st.floats(0.05, 0.95), limit=st.floats(0.5, 8.0), attempts=st.integers(1, 4))
@settings(deadline=None, max_examples=10, derandomize=True)
def test_each_attempt_at_a_release_costs_its_share_of_what_is_left(share, limit, attempts):
    past, left = [], limit
    for _ in range(attempts):
        past.append(first_release(Limit(limit, DELTA), share, past))
        left *= 1 - share
        spent = epsilon(past, DELTA)
        # The noise is calibrated to 0.1 %, on the private side.
        assert limit - left - 0.01 * limit <= spent <= limit - left
