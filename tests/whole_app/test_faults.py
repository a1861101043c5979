"""Faults of the disk and of the process: what is lost is told, and no book says too little.

The faults of the network and of single replies are in test_strategy.py and test_messages.py,
kills of a client in test_kill.py and test_ledger.py, crashes between rounds in test_resume.py.
"""

import json
import math
import os
import random
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.numpy import load_file

from conftest import make_config
from helpers.app_runs import EPSILON, do_not_draw_the_report, do_not_wait_for_nodes, sized
from helpers.fake_grid import FakeGrid
from lalora_app import client_app, server_app
from lalora_app.cli import main
from lalora_app.models import backbone
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.run_config import flatten, parse
from lalora_app.wire import messages

pytestmark = pytest.mark.usefixtures("no_waiting")
without_report = pytest.mark.usefixtures("no_report")
REPEATABLE = {
    "privacy.noise": "seeded",
    "privacy.epsilon": math.inf,
    "num-server-rounds": 3,
    "min-replies": 2,
}


@contextmanager
def full_disk():
    """No file may grow: what the kernel does then, a full disk does as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Disk:
    """A fault of FakeGrid: the disk is full from one reply on, until it is emptied."""

    def __init__(self, attempt: int, partition: int):
        self.moment = attempt, partition
        self.full = full_disk()

    def __call__(self, attempt, partition, reply):
        if (attempt, partition) == self.moment:
            self.full.__enter__()
        return reply

    def full_until_it_ends(self, config):
        try:
            server_app.run(FakeGrid(config, 2, fault=self), config)
        finally:
            self.full.__exit__(None, None, None)


def books() -> Ledger:
    return Ledger(state_folder({}) / "ledger.sqlite")


def folder_of(config) -> RunFolder:
    (path,) = Path(config.output).iterdir()
    return RunFolder(path)


def result(config) -> dict[str, bytes]:
    adapter = load_file(folder_of(config).adapter / "adapter_model.safetensors")
    return {name: array.tobytes() for name, array in adapter.items()}


def apart(tiny, tmp_path, monkeypatch, name, **changes):
    """A config whose output and ledgers nobody has used yet."""
    monkeypatch.setenv("LALORA_HOME", str(tmp_path / name / "home"))
    return tiny(**{**REPEATABLE, "output": str(tmp_path / name / "out"), **changes})


def resumed(config):
    return parse(flatten(config) | {"resume-from": str(folder_of(config).path)})


def ask_again(grid, exchange, **order) -> Message:
    """Send a request once more, with another order."""
    node = exchange.request.metadata.dst_node_id
    content = RecordDict(dict(exchange.request.content))
    content[messages.CONFIG] = ConfigRecord({**content[messages.CONFIG], **order})
    message = Message(content, dst_node_id=node, message_type="train")
    return client_app.app(message, grid.contexts[node])


# --- a full disk ------------------------------------------------------------------------------


@without_report
def test_a_ledger_that_cannot_be_written_is_a_refusal_and_nothing_is_drawn(tiny, monkeypatch):
    config = tiny(**sized(**{"num-server-rounds": 1, "min-replies": 1}))
    grid = FakeGrid(config, 2)
    server_app.run(grid, config)
    before = books().entries()
    drawn = []
    monkeypatch.setattr("lalora_app.private_step.step.add_noise", lambda *a, **k: drawn.append(a))
    exchange = grid.trained(1)[0]
    with full_disk():
        reply = ask_again(grid, exchange, run="another")
    assert reply.content["config"]["refusal"] == "internal"
    assert drawn == []
    assert books().entries() == before
    assert books().damage() == ""


@without_report
def test_a_client_that_cannot_keep_its_files_still_answers(tiny, monkeypatch):
    """The round is paid for: its reply must not be lost with the file for the next one."""
    config = tiny(**sized(**{"num-server-rounds": 2}))
    keep = {"full": 0}

    def no_space(*args, **kwargs):
        keep["full"] += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lalora_app.site_files.resident_factors.save_tensors", no_space)
    monkeypatch.setattr("lalora_app.site_files.last_reply.save_tensors", no_space)
    grid = FakeGrid(config, 2)
    server_app.run(grid, config)
    assert keep["full"] >= 2
    assert all(messages.ARRAYS in exchange.reply.content for exchange in grid.trained())
    assert len(books().entries()) == 4
    assert not list(state_folder({}).rglob("*.tmp"))


@without_report
def test_a_client_that_cannot_keep_what_it_was_sent_still_answers(tiny, monkeypatch):
    config = tiny(**sized(**{"num-server-rounds": 2}))

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lalora_app.site_files.held_download.save_tensors", no_space)
    grid = FakeGrid(config, 2)
    server_app.run(grid, config)
    assert all(messages.ARRAYS in exchange.reply.content for exchange in grid.trained(1))
    refused = {exchange.reply.content["config"]["refusal"] for exchange in grid.trained(2)}
    assert refused == {"held"}  # at no cost; it would be sent everything the next time
    assert len(books().entries()) == 2
    assert not list(state_folder({}).rglob("*.tmp"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_keys):
    """The result of a repeatable run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    config = make_config(**{**tiny_keys, **REPEATABLE, "output": str(folder / "out")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LALORA_HOME", str(folder / "home"))
        do_not_wait_for_nodes(patch)
        do_not_draw_the_report(patch)
        server_app.run(FakeGrid(config, 2), config)
    return result(config)


@without_report
@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_a_server_without_space_fails_and_its_resumed_run_ends_the_same(
    tiny, tmp_path, monkeypatch, whole, attempt
):
    config = apart(tiny, tmp_path, monkeypatch, "full")
    disk = Disk(attempt, 1)
    with pytest.raises(OSError, match="File too large"):
        disk.full_until_it_ends(config)
    if attempt == 1:  # no checkpoint yet: the run begins anew
        again = apart(tiny, tmp_path, monkeypatch, "anew")
        server_app.run(FakeGrid(again, 2), again)
        assert result(again) == whole
        return
    later = resumed(config)
    server_app.run(FakeGrid(later, 2), later)
    assert result(config) == whole


@without_report
def test_a_damaged_ledger_is_a_refusal_and_nothing_is_drawn(tiny, monkeypatch):
    config = tiny(**sized(**{"num-server-rounds": 1}))
    grid = FakeGrid(config, 2)
    server_app.run(grid, config)
    drawn = []
    monkeypatch.setattr("lalora_app.private_step.step.add_noise", lambda *a, **k: drawn.append(a))
    books().path.write_bytes(b"SQLite format 3\0" + bytes(4096))
    exchange = grid.trained(1)[0]
    reply = ask_again(grid, exchange, run="another")
    assert reply.content["config"]["refusal"] == "internal"
    assert drawn == []


# --- too few, for long ------------------------------------------------------------------------


@without_report
def test_ten_rounds_with_too_few_replies_move_nothing_and_the_run_goes_on(tiny):
    def lost(attempt, partition, reply):
        return None if 1 <= attempt <= 10 and partition == 0 else reply

    config = tiny(**sized(**{"num-server-rounds": 12}))
    server_app.run(FakeGrid(config, 2, fault=lost), config)
    rows = folder_of(config).history()
    assert [row["aggregated"] for row in rows] == [False] * 10 + [True] * 2
    assert [row["phase"] for row in rows] == ["B"] * 11 + ["A"]
    assert {row["dropped"][0] for row in rows[:10]} == {"1 did not answer in time"}
    summary = json.loads((folder_of(config).path / "summary.json").read_text("utf-8"))
    assert summary["status"] == "completed, 10 rounds failed"
    for dataset in {entry.dataset for entry in books().entries()}:
        assert len(books().releases(dataset)) == 12  # what was drawn is paid, used or not
        assert epsilon(books().releases(dataset), 1e-5) <= config.privacy.epsilon


# --- two nodes, one dataset -------------------------------------------------------------------


@without_report
def test_two_nodes_on_one_dataset_share_its_book(tiny, tmp_path):
    path = tmp_path / "shared.jsonl"
    rows = [{"text": f"hello {i}", "label": i % 2} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    limit = {"max-epsilon": 8.0, "delta": 1e-5}
    nodes = [{"data-path": str(path), "name": name, **limit} for name in ("a", "b")]
    config = tiny(**{"num-server-rounds": 1, "privacy.epsilon": EPSILON})
    server_app.run(FakeGrid(config, nodes), config)
    (dataset,) = {entry.dataset for entry in books().entries()}
    first, second = books().releases(dataset)  # of both nodes
    assert second.noise_multiplier > 1.1 * first.noise_multiplier  # and not more epsilon
    assert epsilon([first, second], 1e-5) <= config.privacy.epsilon


# --- kill -9 of everything at once ------------------------------------------------------------

KILLS = 12
OURS = str(Path(server_app.__file__).parent)


class Moments:
    """Counts the calls from our own code, and kills the process at the one called ``last``.

    A moment is a call and not a time: it lies within the run on a machine of any speed, and a
    failure comes back with its seed.
    """

    def __init__(self, last: int | None = None):
        self.last = last
        self.passed = 0

    def __call__(self, frame, event, argument):
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(OURS):
            return
        self.passed += 1
        if self.passed == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, config) -> int:
        """Run to the end and return the number of moments there were."""
        sys.setprofile(self)
        try:
            server_app.run(FakeGrid(config, 2), config)
        finally:
            sys.setprofile(None)
        return self.passed


def _run_in_a_child(config, last: int | None) -> bool:
    """Tell whether the run was killed, at its ``last`` moment."""
    pid = os.fork()
    if not pid:
        try:
            Moments(last).run(config)
        finally:
            os._exit(1)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _killed_until_done(config, moments: int, chance) -> int:
    """Run, kill at a random moment, resume; after KILLS kills let it end. Return their number."""
    kills = 0
    while True:
        last = chance.randint(1, moments // 6) if kills < KILLS else None
        kills += _run_in_a_child(config, last)
        out = Path(config.output)
        if not out.exists() or not any(out.iterdir()):
            continue
        folder = max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        if (folder / "summary.json").is_file() and (folder / "report.html").is_file():
            return kills
        if list((folder / "checkpoints").glob("attempt-*.safetensors")):
            config = parse(flatten(config) | {"resume-from": str(folder)})


def _final(config) -> dict[str, bytes]:
    (path,) = Path(config.output).glob("*/adapter/adapter_model.safetensors")
    return {name: array.tobytes() for name, array in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("budget", [math.inf, 2.0])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(
    tiny, tmp_path, monkeypatch, budget
):
    """Without noise to raise, bit for bit; with a budget, within it, and by honest books."""
    changes = {"num-server-rounds": 6, "privacy.epsilon": budget}
    whole = apart(tiny, tmp_path, monkeypatch, "whole", **changes)
    backbone.build(whole)  # before the forks: children start at once
    moments = Moments().run(whole)
    config = apart(tiny, tmp_path, monkeypatch, "killed", **changes)
    kills = _killed_until_done(config, moments, random.Random(0))
    assert kills >= KILLS // 2
    ledger = state_folder({}) / "ledger.sqlite"
    assert main.main(["ledger", "verify", "--path", str(ledger)]) == 0
    if math.isinf(budget):
        assert _final(config) == _final(whole)
        return
    for dataset in {entry.dataset for entry in books().entries()}:
        for run in {entry.run for entry in books().entries(dataset)}:
            assert epsilon(books().releases(dataset, run), 1e-5) <= budget
