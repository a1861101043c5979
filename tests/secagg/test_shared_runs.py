"""Whole runs in which clients share the noise of the sum."""

import math

import numpy as np
import pytest

from helpers.app_runs import (
    CrashError,
    crash_after_training,
    crash_before,
    fresh,
    interrupted,
    ledger_entries,
    open_run,
    run,
    sized,
)
from helpers.fake_grid import FakeGrid
from helpers.secure_runs import CLIENTS, lose, states
from lalora_app import server_app
from lalora_app.adapter.factors import select
from lalora_app.data.partition import clients_data
from lalora_app.privacy.accounting import epsilon
from lalora_app.private_step import step
from lalora_app.shared_noise.run_constants import noise_multiplier
from lalora_app.shared_noise.seeded import component
from lalora_app.shared_noise.shares import Cohort

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")

ROUNDS = 4
SUM = {
    "method": "rolora",
    "privacy.noise-share": "sum",
    "secure-aggregation": "secagg+",
    "num-server-rounds": ROUNDS,
    "train.local-steps": 1,
    "train.sampling-rate": 0.5,
    "train.optimizer": "sgd",
    "train.lr-a": 0.5,
    "train.lr-b": 0.5,
    "train.lr-w": 0.5,
    "train.lr-head": 0.5,
    "min-replies": 3,
}


def spent(entries) -> float:
    return epsilon([entry.release for entry in entries], 1e-5)


def of_each_client(entries):
    books = {}
    for entry in entries:
        books.setdefault(entry.dataset, []).append(entry)
    return books


def test_every_line_of_the_ledgers_has_two_multipliers(tiny, tmp_path, monkeypatch):
    done = run(fresh(tiny, tmp_path, monkeypatch, "sum", **sized(CLIENTS) | SUM), CLIENTS)
    assert [row["aggregated"] for row in done.rows] == [True] * ROUNDS
    assert [row["dropped"] for row in done.rows] == [[]] * ROUNDS
    entries = ledger_entries()
    assert len(entries) == ROUNDS * CLIENTS
    (release,) = {entry.release for entry in entries}
    assert (release.sampling_rate, release.count) == (0.5, 1)
    alone = release.noise_multiplier / math.sqrt(3)
    assert {entry.alone for entry in entries} == {Cohort(4, 3).alone(release.noise_multiplier)}
    assert entries[0].alone == pytest.approx(alone)
    promised = done.config.privacy.epsilon
    assert all(0.9 * promised < spent(e) <= promised for e in of_each_client(entries).values())
    assert done.json("summary.json")["epsilon_alone"] > promised


@pytest.mark.parametrize("method", ["rolora", "dp-lora", "head-only", "ffa-lora", "full"])
def test_without_noise_clients_are_one_client_with_all_data(tiny, tmp_path, monkeypatch, method):
    changes = open_run(CLIENTS) | SUM | {"method": method, "train.sampling-rate": 1.0}
    shared = run(fresh(tiny, tmp_path, monkeypatch, "sum", **changes), CLIENTS)
    alone = changes | {
        "privacy.noise-share": "own",
        "secure-aggregation": "none",
        "min-clients": 1,
        "min-replies": 1,
        "central": True,
    }
    central = run(fresh(tiny, tmp_path, monkeypatch, "central", **alone), CLIENTS)
    start = central.grid.trained(1)[0].start
    moved = 0.0
    for name, expected in central.folder.latest().adapter.items():
        np.testing.assert_allclose(shared.folder.latest().adapter[name], expected, atol=2e-6)
        moved = max(moved, float(np.abs(expected - start[name]).max()))
    assert moved > 0.01


@pytest.mark.parametrize("lost", [(), (2,)], ids=["nobody lost", "one lost"])
def test_a_round_is_the_step_of_one_client_with_the_whole_noise(tiny, tmp_path, monkeypatch, lost):
    """Each client's batch sum and seeds are recorded; one plain step in float64 follows."""
    sums, shares = [], []
    to_lattice, share = step.to_lattice, step.share

    def seen_sum(x, unit):
        sums.append(x)
        return to_lattice(x, unit)

    def seen_share(seeds, lattice):
        shares.append((seeds, lattice))
        return share(seeds, lattice)

    monkeypatch.setattr(step, "to_lattice", seen_sum)
    monkeypatch.setattr(step, "share", seen_share)
    config = fresh(tiny, tmp_path, monkeypatch, "step", **sized(CLIENTS) | SUM)
    done = run(config, CLIENTS, fault=lose("train", 1, *lost))
    order = [exchange.partition for exchange in done.grid.trained(1)]
    there = [i for i, partition in enumerate(order) if partition not in lost]
    lattice = shares[0][1]
    total = np.sum([sums[i] for i in there], axis=0)
    for i in there:  # the components that nobody needs are gone
        for number in range(lattice.constants.cohort.needed(len(lost)) + 1):
            total = total + lattice.unit * component(shares[i][0][number], number, lattice)
    gradient = total / (0.5 * lattice.constants.examples)
    before, after = states(done)[:2]
    sent = select(before, frozenset({"B"}))
    rounding = CLIENTS / 2 * lattice.unit / (0.5 * lattice.constants.examples)
    place = 0
    for name in sorted(sent):
        part = gradient[place : place + sent[name].size].reshape(sent[name].shape)
        expected = before[name] - 0.5 * part
        np.testing.assert_allclose(after[name], expected, atol=0.5 * rounding + 1e-6)
        assert np.abs(part).max() > 0.01
        place += sent[name].size
    assert place == gradient.size
    assert set(after) == set(before)
    assert lattice.constants.examples == sum(len(e) for e in clients_data(config, CLIENTS))


def test_the_run_goes_on_without_a_client_that_is_lost(tiny, tmp_path, monkeypatch):
    config = fresh(tiny, tmp_path, monkeypatch, "lost", **sized(CLIENTS) | SUM)
    done = run(config, CLIENTS, fault=lose("train", 2, 1))
    assert [row["aggregated"] for row in done.rows] == [True] * ROUNDS
    assert [row["replies"] for row in done.rows][:2] == [4, 3]
    assert all(
        spent(e) <= config.privacy.epsilon for e in of_each_client(ledger_entries()).values()
    )


def test_a_failed_attempt_is_one_of_the_releases_that_were_planned(tiny, tmp_path, monkeypatch):
    config = fresh(tiny, tmp_path, monkeypatch, "failed", **sized(CLIENTS) | SUM)
    done = run(config, CLIENTS, fault=lose("train", 2, 1, 2))
    assert [row["aggregated"] for row in done.rows] == [True, False, True, True]
    books = of_each_client(ledger_entries())
    assert {len(entries) for entries in books.values()} == {ROUNDS}
    assert all(spent(entries) <= config.privacy.epsilon for entries in books.values())
    assert len({entry.release for entry in ledger_entries()}) == 1


@pytest.mark.parametrize("crash", ["before the attempt", "after training"])
def test_a_resumed_run_does_not_repeat_the_attempt(tiny, tmp_path, monkeypatch, crash):
    config = fresh(tiny, tmp_path, monkeypatch, crash[:5], **sized(CLIENTS) | SUM)
    faults = {"before the attempt": {"before": crash_before(3)}}
    faults["after training"] = {"fault": crash_after_training(3, CLIENTS)}
    _, later = interrupted(config, CLIENTS, **faults[crash])
    done = run(later, CLIENTS)
    assert done.folder.history() == done.rows
    assert [row["aggregated"] for row in done.rows] == [True, True, False, True]
    assert done.rows[2]["dropped"] == ["the run was interrupted in this attempt"]
    assert [row["attempt"] for row in done.rows] == [1, 2, 3, 4]
    books = of_each_client(ledger_entries())
    assert max(len(entries) for entries in books.values()) <= ROUNDS
    assert all(spent(entries) <= config.privacy.epsilon for entries in books.values())


def test_a_run_that_is_interrupted_in_its_last_attempt_ends_with_the_rounds_before(
    tiny, tmp_path, monkeypatch
):
    config = fresh(tiny, tmp_path, monkeypatch, "last", **sized(CLIENTS) | SUM)
    _, later = interrupted(config, CLIENTS, fault=crash_after_training(ROUNDS, CLIENTS))
    done = run(later, CLIENTS)
    assert [row["aggregated"] for row in done.rows] == [True, True, True, False]
    assert done.json("summary.json")["status"] == "completed, 1 rounds failed"
    assert done.adapter


def test_an_attempt_is_not_repeated_after_two_interruptions(tiny, tmp_path, monkeypatch):
    config = fresh(tiny, tmp_path, monkeypatch, "twice", **sized(CLIENTS) | SUM)
    _, later = interrupted(config, CLIENTS, fault=crash_after_training(2, CLIENTS))
    grid = FakeGrid(later, CLIENTS, fault=crash_after_training(3, CLIENTS))
    with pytest.raises(CrashError):
        server_app.run(grid, later)
    done = run(later, CLIENTS)
    assert [row["aggregated"] for row in done.rows] == [True, False, False, True]
    books = of_each_client(ledger_entries())
    assert max(len(entries) for entries in books.values()) <= ROUNDS
    assert all(spent(entries) <= config.privacy.epsilon for entries in books.values())


def test_every_client_has_the_same_noise_whatever_it_has_released(tiny, tmp_path, monkeypatch):
    """A client that joins late, or has other releases in its ledger, must not draw less."""
    config = fresh(tiny, tmp_path, monkeypatch, "late", **sized(CLIENTS) | SUM)
    run(config, CLIENTS, fault=lose("share", 1, 2))
    releases = {entry.release for entry in ledger_entries()}
    assert len(releases) == 1
    assert {noise_multiplier(config)} == {release.noise_multiplier for release in releases}
    longer = tiny(**sized(CLIENTS) | SUM | {"num-server-rounds": 40})
    assert noise_multiplier(longer) > noise_multiplier(config)
