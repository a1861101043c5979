"""Accounting outside of the ledger's transaction: nobody waits for it, and no budget is overrun."""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.client import answers
from lalora_app.privacy import budget
from lalora_app.privacy import ledger as ledger_module
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import BudgetError, Limit
from lalora_app.privacy.ledger import Ledger, LedgerBusyError
from lalora_app.wire.refusals import REFUSALS

FAR = Limit(1e9, 1e-5)


def reserve(ledger: Ledger, run: str, most: float, count: int = 1, **limits):
    return ledger.reserve(
        *("data", run, 1, Release(0.1, 1.0, count)),
        **{"planned": count, "run_limit": FAR, "node_limit": Limit(most, 1e-5)} | limits,
    )


def spent(releases, delta) -> float:
    """ε by counting, so that a limit is a number of releases."""
    return float(sum(release.count for release in releases))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_two_clients_compute_at_the_same_time(path, monkeypatch):
    """Each accounting waits until the other one has begun: under a lock, neither would end."""
    both = threading.Barrier(2)
    first = threading.local()

    def meet(releases, delta):
        if not getattr(first, "met", False):
            first.met = True
            both.wait(timeout=20)
        return spent(releases, delta)

    monkeypatch.setattr(budget, "epsilon", meet)
    ledgers = [Ledger(path), Ledger(path)]
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(reserve, one, f"run{i}", 100) for i, one in enumerate(ledgers)]
        assert all(future.result(timeout=60) for future in done)
    assert sorted(entry.run for entry in ledgers[0].entries()) == ["run0", "run1"]


def test_a_write_during_slow_accounting_does_not_wait_for_it(path, monkeypatch):
    ledger = Ledger(path)
    waited = []

    def slow(releases, delta):
        began = time.monotonic()
        with sqlite3.connect(path, timeout=0) as other:  # raises at once if the file is locked
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        waited.append(time.monotonic() - began)
        return spent(releases, delta)

    monkeypatch.setattr(budget, "epsilon", slow)
    assert reserve(ledger, "run", 100)
    assert len(waited) == 2


def interleaved(monkeypatch, ledger: Ledger, arrivals: list[int]) -> None:
    """Let another process write between the snapshot and the commit, once per accounting."""
    waiting = iter(arrivals)

    def accounted(releases, delta):
        found = spent(releases, delta)
        if count := next(waiting, 0):
            entry = ledger.entries()[-1] if ledger.entries() else None
            name = f"other{len(ledger.entries())}"
            uid = f"{name}-{entry.uid if entry else ''}"
            with sqlite3.connect(ledger.path) as db:
                db.execute(
                    "INSERT INTO releases (time, dataset, run, round, sampling_rate, "
                    "noise_multiplier, count, uid) VALUES (?, 'data', ?, 1, 0.1, 1.0, ?, ?)",
                    (datetime.now().isoformat(), name, count, uid),
                )
        return found

    monkeypatch.setattr(budget, "epsilon", accounted)


def test_a_conflicting_reservation_between_snapshot_and_commit_is_seen(path, monkeypatch):
    ledger = Ledger(path)
    interleaved(monkeypatch, ledger, [0, 3])  # after the node's limit was found to hold
    with pytest.raises(BudgetError, match=r"node's epsilon would be 4\.000"):
        reserve(ledger, "run", 3)
    assert [entry.run for entry in ledger.entries()] == ["other0"]


def test_a_reservation_that_still_fits_is_computed_again_and_written(path, monkeypatch):
    ledger = Ledger(path)
    interleaved(monkeypatch, ledger, [0, 1, 1, 0])
    assert reserve(ledger, "run", 3)
    assert [entry.run for entry in ledger.entries()] == ["other0", "other1", "run"]


def test_another_datasets_line_does_not_cost_a_second_computation(path, monkeypatch):
    ledger, calls = Ledger(path), []

    def counted(releases, delta):
        calls.append(len(releases))
        if len(calls) == 1:
            ledger.reserve(
                *("another", "run", 1, Release(0.1, 1.0, 1)),
                **{"planned": 1, "run_limit": Limit(float("inf"), 1e-5)},
                node_limit=Limit(float("inf"), 1e-5),
            )
        return spent(releases, delta)

    monkeypatch.setattr(budget, "epsilon", counted)
    assert reserve(ledger, "run", 3)
    assert len(calls) == 2  # the run's and the node's, once


@pytest.mark.parametrize(("key", "limit"), [("max_rounds", 1), ("per_day", 1)])
def test_counts_of_rounds_hold_in_a_race_too(path, monkeypatch, key, limit):
    ledger, done = Ledger(path), []

    def race(releases, delta):
        if not done:
            done.append(True)
            reserve(ledger, "run", 100)
        return spent(releases, delta)

    monkeypatch.setattr(budget, "epsilon", race)
    with pytest.raises(BudgetError, match="rounds"):
        reserve(ledger, "run", 100, **{key: limit})
    assert len(ledger.entries()) == 1


@settings(max_examples=25, deadline=None)
@given(
    most=st.integers(1, 8),
    wanted=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    arrivals=st.lists(st.integers(0, 2), max_size=8),
)
def test_no_interleaving_overruns_the_budget(tmp_path_factory, most, wanted, arrivals):
    """Other processes write whatever they find allowed, at any moment of our accounting."""
    ledger = Ledger(tmp_path_factory.mktemp("race") / "ledger.sqlite")
    waiting = iter(arrivals)

    def accounted(releases, delta):
        found = spent(releases, delta)
        count = next(waiting, 0)
        if count and spent(ledger.releases("data"), delta) + count <= most:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(budget, "epsilon", spent)
                reserve(ledger, "other", most, count)
        return found

    granted = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "epsilon", accounted)
        for count in wanted:
            try:
                reserve(ledger, "ours", most, count)
            except BudgetError:
                continue
            granted += count
    assert spent(ledger.releases("data"), 1e-5) <= most
    assert spent(ledger.releases("data", "ours"), 1e-5) == granted


class Killed(BaseException):
    """The process ends here."""


def test_a_crash_between_snapshot_and_commit_writes_nothing(path, monkeypatch):
    ledger = Ledger(path)

    def crash(*arguments):
        raise Killed

    for module, name in ((budget, "epsilon"), (ledger_module, "write_entry")):
        with monkeypatch.context() as patch:
            patch.setattr(budget, "epsilon", spent)
            patch.setattr(module, name, crash)
            with pytest.raises(Killed):
                reserve(ledger, "run", 3)
    assert ledger.entries() == []
    assert ledger.damage() == ""


@pytest.fixture
def locked(path, monkeypatch):
    """A ledger that another process keeps locked for longer than ours waits."""
    ledger = Ledger(path)
    monkeypatch.setattr(ledger_module, "_WAIT", 0.05)
    monkeypatch.setattr(budget, "epsilon", spent)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    yield ledger
    other.execute("ROLLBACK")
    other.close()
    assert ledger.entries() == []


def test_a_ledger_that_stays_locked_is_busy_in_one_line(locked):
    for use in (lambda: reserve(locked, "run", 3), locked.entries, locked.damage):
        with pytest.raises(LedgerBusyError, match="stayed locked by another process") as caught:
            use()
        assert str(locked.path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_server_is_told_that_the_ledger_is_busy_and_no_more(locked):
    def handle(message, context):
        reserve(locked, "run", 3)

    with pytest.raises(LedgerBusyError) as caught:
        handle(None, None)
    key = answers.refusal_key(caught.value, SimpleNamespace())
    assert REFUSALS[key] == "the client's ledger is in use by another process; try again later"
