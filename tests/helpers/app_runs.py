"""Whole runs of the app in one process, and what they leave.

360 training examples, dealt IID, and an expected batch of 24 over the number of clients give every
client the sampling rate 1/15; three rounds of two steps (or two of three) make six releases. All
private runs share these numbers, so the accountant calibrates once per process.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.adapter.factors import kind
from lalora_app.client import local_round
from lalora_app.data.examples import split
from lalora_app.methods.table import METHODS
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.results.run_folder import RunFolder
from lalora_app.server import ending, enrolment
from lalora_app.settings.run_config import Config, flatten, parse
from lalora_app.wire import messages

INF = float("inf")
TRAIN_SIZE, RATE, EPSILON, DELTA = 360, 1 / 15, 0.3, 1e-5


def do_not_wait_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run begin at once: the nodes of a FakeGrid are all there from the start."""
    monkeypatch.setattr(enrolment, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(server_app, "SETTLE_SECONDS", 0.0)


def do_not_draw_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the page of a run: drawing it takes longer than a tiny run."""
    monkeypatch.setattr(ending, "_write_report", lambda folder: None)


def sized(clients: int = 2, **changes):
    """The keys that make every client's sampling rate 1/15, and a private run of three rounds.

    AdamW moves every tensor by about its learning rate, however small the gradients are.
    """
    return {
        "method": "la-lora",
        "min-clients": 2,
        "min-replies": 2,
        "privacy.delta": DELTA,
        "privacy.clip-norm": 1.0,
        "privacy.noise": "secure",
        "train.optimizer": "adamw",
        "train.momentum": 0.0,
        "train.lr-a": 1e-3,
        "train.lr-b": 2e-3,
        "train.lr-w": 1e-3,
        "train.lr-head": 1e-2,
        "data.dirichlet-alpha": INF,
        "data.test-fraction": 0.11,
        "privacy.epsilon": EPSILON,
        "num-server-rounds": 3,
        "train.batch-size": 24 // clients,
    } | changes


def open_run(clients: int = 2, **changes):
    """The same without a budget, for tests in which epsilon plays no part."""
    return sized(clients, **{"privacy.epsilon": INF} | changes)


@dataclass
class Run:
    """A finished run and what it left."""

    config: Config
    grid: FakeGrid
    folder: RunFolder

    @property
    def rows(self):
        return self.folder.history()

    def json(self, name):
        return json.loads((self.folder.path / name).read_text("utf-8"))

    @property
    def adapter(self):
        return load_file(self.folder.adapter / "adapter_model.safetensors")


def run_folder(config: Config) -> RunFolder:
    (path,) = Path(config.output).iterdir()
    return RunFolder(path)


def run(config: Config, nodes=2, **faults) -> Run:
    grid = FakeGrid(config, nodes, **faults)
    server_app.run(grid, config)
    return Run(config, grid, run_folder(config))


def ledger_entries():
    path = state_folder({}) / "ledger.sqlite"
    return Ledger(path).entries() if path.exists() else []


def by_dataset(entries):
    books: dict[str, list] = {}
    for entry in entries:
        books.setdefault(entry.dataset, []).append(entry)
    return books


def arrays(message):
    return {n: a.numpy() for n, a in message.content.array_records[messages.ARRAYS].items()}


def same_bits(one, other):
    return set(one) == set(other) and all(one[n].tobytes() == other[n].tobytes() for n in one)


@dataclass
class Round:
    """One call of local_round.run_round: what it started from and what it came to."""

    t: int
    start: dict
    result: dict


def spied(monkeypatch):
    """Record every local round from now on, in order."""
    seen: list[Round] = []
    honest = local_round.run_round

    def spy(model, data, start, drift, **options):
        kept = {name: array.copy() for name, array in start.items()}
        result = honest(model, data, start, drift, **options)
        seen.append(Round(options["local"].t, kept, {n: a.copy() for n, a in result.items()}))
        return result

    monkeypatch.setattr(local_round, "run_round", spy)
    return seen


def of_kind(adapter, which):
    return {name: array for name, array in adapter.items() if kind(name) == which}


def local_steps(config: Config, t: int = 1) -> local_round.LocalSettings:
    """What round ``t`` of the config's run follows."""
    settings = (config.train, config.rule, config.privacy.clip_norm)
    return local_round.LocalSettings(METHODS[config.method], t, config.num_server_rounds, *settings)


def tokens_of(config: Config, side: int):
    from transformers import AutoTokenizer

    examples = split(config.data)[side]
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    tokens = tokenizer(
        list(examples.contents),
        padding=True,
        truncation=True,
        max_length=config.model.max_length,
        return_tensors="pt",
    )
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    return inputs, torch.tensor(examples.labels)


def rounds_of(done: Run, rounds, partition):
    """Return (exchange, round) of one client; both lists are in the order of asking."""
    pairs = zip(done.grid.trained(), rounds, strict=True)
    return [(e, r) for e, r in pairs if e.partition == partition]


def lose(path: Path):
    path.unlink()


def damage(path: Path):
    path.write_bytes(path.read_bytes()[:50])


def fresh(tiny, tmp_path, monkeypatch, name, **changes) -> Config:
    """A config whose output and LALORA_HOME nobody has used yet."""
    monkeypatch.setenv("LALORA_HOME", str(tmp_path / name / "home"))
    return tiny(**sized() | {"output": str(tmp_path / name / "out")} | changes)


class CrashError(Exception):
    """The server's process, dying."""


def crash_before(attempt: int) -> Callable[[int], None]:
    def before(now: int) -> None:
        if now == attempt:
            raise CrashError

    return before


def crash_after_training(attempt: int, clients: int):
    """CrashError once clients of an attempt have trained, before the server has a reply."""
    seen = []

    def fault(now: int, partition: int, reply):
        seen.append(now)
        if seen.count(attempt) == clients:
            seen.clear()  # the next test begins anew
            raise CrashError
        return reply

    return fault


def lose_replies() -> None:
    """Leave the clients as they are when killed before they could keep their replies."""
    for path in (state_folder({}) / "replies").iterdir():
        path.unlink()


def interrupted(config: Config, nodes: int, **faults) -> tuple[Run, Config]:
    """Run until the crash; return that half and the config that goes on from it."""
    grid = FakeGrid(config, nodes, **faults)
    with pytest.raises(CrashError):
        server_app.run(grid, config)
    folder = run_folder(config)
    later = parse(flatten(config) | {"resume-from": str(folder.path)})
    return Run(config, grid, folder), later


def cohorts(grid: FakeGrid):
    asked: dict[int, set[int]] = {}
    for exchange in grid.trained():
        asked.setdefault(exchange.attempt, set()).add(exchange.partition)
    return asked


def contents(message):
    return {name: set(record) for name, record in message.content.items()}


def sizes_told(done: Run):
    return {
        exchange.partition
        for exchange in done.grid.trained()
        if any("num-examples" in record for record in exchange.reply.content.values())
    }
