"""kill -9 of a client between reservation and reply: the ledger never says less than was drawn."""

import itertools
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from helpers.fake_grid import FakeGrid, identify
from lalora_app.cli import main
from lalora_app.data.partition import partition
from lalora_app.models import backbone
from lalora_app.privacy.accounting import Release, epsilon, second_epsilon
from lalora_app.privacy.budget import Limit, noise_for
from lalora_app.privacy.ledger import Ledger
from lalora_app.private_step import step
from lalora_app.server.cohorts import Clients
from lalora_app.server.strategy import FederatedLora
from lalora_app.server_state.state import ServerState

KILLS = 20
ROUNDS = 40
DELTA = 1e-5


def _mark_every_draw(side: Path, die_at: int | None):
    """Append a line to ``side``, on disk, whenever noise was drawn; die before draw ``die_at``."""
    add_noise = step.add_noise
    draws = itertools.count()

    def marked(*args, **kwargs):
        if next(draws) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)  # the worst moment: reserved, and not drawn
        noised = add_noise(*args, **kwargs)
        with side.open("a") as file:
            file.write("drawn\n")
            file.flush()
            os.fsync(file.fileno())
        return noised

    step.add_noise = marked


def _client(config, side: Path, run: str, die_at: int | None):
    """Answer train messages until killed."""
    _mark_every_draw(side, die_at)
    grid = FakeGrid(config, 1)
    model, start = backbone.build(config)
    node = next(iter(grid.contexts))
    clients = Clients([node], [(0,)] * ROUNDS, model=model.fingerprint)
    strategy = FederatedLora(config, _method(config), run, clients, ServerState(start))
    for _ in range(ROUNDS):
        requests = strategy.configure_train(0, None, None, grid)
        strategy.aggregate_train(0, grid.send_and_receive(requests))


def _method(config):
    from lalora_app.methods.compatibility import method_of

    return method_of(config)


def _counted(ledger: Path) -> int:
    if not ledger.exists():
        return 0
    db = sqlite3.connect(ledger)
    try:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'releases'").fetchone():
            return 0  # the client has just made the file
        return db.execute("SELECT coalesce(sum(count), 0) FROM releases").fetchone()[0]
    finally:
        db.close()


def _calibrate_once(config):
    """Fill the accountant's cache before the fork: all runs calibrate alike."""
    size = len(partition(config.data, config.seed, 1)[0])
    rate, steps = config.train.batch_size / size, ROUNDS * config.train.local_steps
    noise_for([], Limit(config.privacy.epsilon, DELTA), sampling_rate=rate, steps=steps)


@pytest.mark.slow
@pytest.mark.quiet
def test_the_ledger_never_under_reports_when_the_client_is_killed(tiny, tmp_path):
    identify()
    config = tiny(**{"num-server-rounds": ROUNDS, "train.local-steps": 2, "min-replies": 1})
    backbone.build(config)  # before the fork: children start at once
    _calibrate_once(config)
    ledger, side = tmp_path / "home" / "ledger.sqlite", tmp_path / "drawn"
    side.touch()
    chance = random.Random(0)
    killed_between = lost_before = 0
    for kill in range(KILLS):
        die_at = kill // 2 if kill % 2 else None  # odd ones die by themselves, even ones by chance
        before = _counted(ledger)
        pid = os.fork()
        if pid == 0:
            try:
                _client(config, side, f"run-{kill}", die_at)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while _counted(ledger) == before and time.monotonic() < deadline:
            time.sleep(0.005)  # its first reservation: from here on the kill can come between
        if die_at is None:
            time.sleep(chance.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)  # it was still at work
        lost = _counted(ledger) - len(side.read_text().splitlines())
        assert lost >= lost_before  # what is drawn was counted
        killed_between += lost > lost_before
        lost_before = lost
    assert killed_between >= KILLS // 2  # at least those that died by themselves
    _verify(ledger)


@pytest.mark.slow
@pytest.mark.quiet
def test_class_sums_are_counted_when_the_client_is_killed_before_their_noise(tiny, tmp_path):
    identify()
    keys = {"model.head": "class-means", "model.pooling": "mean", "privacy.epsilon": float("inf")}
    config = tiny(**keys, **{"num-server-rounds": ROUNDS, "min-replies": 1})
    backbone.build(config)  # before the fork: the child starts at once
    side = tmp_path / "drawn"
    side.touch()
    pid = os.fork()
    if pid == 0:
        try:
            _client(config, side, "run", die_at=0)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert side.read_text() == ""  # nothing was drawn
    (entry,) = Ledger(tmp_path / "home" / "ledger.sqlite").entries()
    assert (entry.round, entry.release) == (1, Release(1.0, 0.0, 1))


def _verify(path: Path):
    """Both accountants agree on every run and on the whole to 1 %, and so does the command."""
    entries = Ledger(path).entries()
    for run in {entry.run for entry in entries} | {None}:
        releases = [e.release for e in entries if run in (None, e.run)]
        first, second = epsilon(releases, DELTA), second_epsilon(releases, DELTA)
        assert first == pytest.approx(second, rel=0.01, abs=0.004)
    assert main.main(["ledger", "verify", "--path", str(path)]) == 0
