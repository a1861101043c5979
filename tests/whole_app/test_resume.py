"""Test crashes of the server, resumed runs, and repeated requests."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from conftest import make_config
from helpers.app_runs import (
    DELTA,
    EPSILON,
    INF,
    arrays,
    by_dataset,
    cohorts,
    crash_after_training,
    crash_before,
    do_not_draw_the_report,
    do_not_wait_for_nodes,
    fresh,
    interrupted,
    ledger_entries,
    lose_replies,
    open_run,
    run,
    same_bits,
    sized,
)
from helpers.fake_grid import FakeGrid
from lalora_app import client_app, server_app
from lalora_app.privacy.accounting import epsilon
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten, parse
from lalora_app.wire import messages

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
CRASHES = {
    "before a round": {"before": crash_before(3)},
    "in a round": {"fault": crash_after_training(3, clients=1)},
    "after a round": {"fault": crash_after_training(3, clients=2)},
}


RESUMED = {
    "privacy.noise": "seeded",
    "num-server-rounds": 4,
    "fraction-train": 0.5,  # of 4 clients: everyone takes part twice, with 3 steps
    "train.local-steps": 3,
    "train.batch-size": 6,
}


# With the moments or the average begun before the crash at the third of four attempts.
SERVER = {
    "": {},
    "yogi": {"server.optimizer": "yogi", "server.lr": 0.01, "server.average": "ema:0.5"},
    "momentum": {"server.optimizer": "momentum", "server.average": "tail:0.75"},
    "pruned": {"rule.sparsity": 0.5, "rule.sparsity-steps": 2, "rule.sparsity-spread": 0.1},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_keys):
    """Return the run of a method that nothing interrupts, made once."""

    @cache
    def whole(method, server=""):
        folder = tmp_path_factory.mktemp(method)
        own = {"method": method, "output": str(folder / "out")} | SERVER[server]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LALORA_HOME", str(folder / "home"))
            do_not_wait_for_nodes(patch)
            do_not_draw_the_report(patch)
            return run(make_config(**(tiny_keys | sized() | RESUMED | own)), 4)

    return whole


@pytest.mark.parametrize(
    ("method", "moment", "server"),
    [
        *(("la-lora", moment, "") for moment in CRASHES),
        ("fedex-lora", "in a round", ""),
        ("sd-lora", "before a round", ""),
        ("dp-fedadamw-full", "in a round", ""),
        ("la-lora", "in a round", "yogi"),
        ("full", "in a round", "yogi"),
        ("rolora", "before a round", "momentum"),
        ("losa", "in a round", "pruned"),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    tiny, uninterrupted, method, moment, server
):
    whole = uninterrupted(method, server)
    config = tiny(**sized(method=method) | RESUMED | SERVER[server])
    first, later = interrupted(config, 4, **CRASHES[moment])
    assert cohorts(first.grid).keys() >= {1, 2}
    assert (first.folder.latest().round, first.folder.latest().attempts) == (2, 2)
    second = run(later, 4)
    assert second.folder.path == first.folder.path
    assert cohorts(second.grid).keys() == {3, 4}
    assert {**cohorts(first.grid), **cohorts(second.grid)} == cohorts(whole.grid)
    for key in ("attempt", "round", "phase", "aggregated", "accuracy", "epsilon_max"):
        assert [row[key] for row in second.rows] == [row[key] for row in whole.rows], key
    assert same_bits(second.adapter, whole.adapter)
    ended, expected = second.folder.latest(), whole.folder.latest()
    for part in ("adapter", "first_moment", "second_moment", "average"):
        assert same_bits(getattr(ended, part), getattr(expected, part)), part
    assert second.json("summary.json")["rounds"] == 4
    entries = ledger_entries()
    assert {entry.run for entry in entries} == {first.folder.name}
    assert sorted(entry.round for entry in entries) == [1, 1, 2, 2, 3, 3, 4, 4]
    for book in by_dataset(entries).values():
        assert epsilon([entry.release for entry in book], DELTA) <= EPSILON


def test_a_round_that_was_answered_is_answered_again_and_costs_nothing(tiny, rounds):
    config = tiny(**sized())
    first, later = interrupted(config, 2, fault=crash_after_training(2, clients=2))
    second = run(later)
    for exchange in second.grid.trained(2):
        (before,) = [e for e in first.grid.trained(2) if e.partition == exchange.partition]
        assert same_bits(arrays(exchange.reply), arrays(before.reply))
    assert [r.t for r in rounds] == [1, 1, 2, 2, 3, 3]
    for book in by_dataset(ledger_entries()).values():
        assert [entry.round for entry in book] == [1, 2, 3]
        assert len({entry.release.noise_multiplier for entry in book}) == 1


def test_another_request_is_never_answered_with_an_old_reply(tiny, rounds):
    done = run(tiny(**open_run() | {"num-server-rounds": 1}))
    exchange = done.grid.trained(1)[0]
    node = exchange.request.metadata.dst_node_id
    content = dict(exchange.request.content)
    config, order = messages.run_config_of(exchange.request.content), dict(content[messages.CONFIG])
    start = dict(content[messages.ARRAYS])
    head = next(name for name in start if ".lora_" not in name)
    moved = start | {head: Array(start[head].numpy() + np.float32(1e-7))}
    others = [
        {messages.CONFIG: ConfigRecord(order | {"run": "another"})},
        {messages.ARRAYS: ArrayRecord(moved)},
        {messages.RUN_CONFIG: messages.run_config(config | {"train.lr-b": 1e-4})},
    ]
    for change in others:
        before = len(rounds)
        message = Message(RecordDict(content | change), dst_node_id=node, message_type="train")
        reply = client_app.app(message, done.grid.contexts[node])
        assert messages.ARRAYS in reply.content
        assert len(rounds) == before + 1


def test_a_repeated_round_costs_more_noise_and_not_more_epsilon(tiny, tmp_path, monkeypatch):
    config = fresh(tiny, tmp_path, monkeypatch, "run")
    first, later = interrupted(config, 2, fault=crash_after_training(2, clients=2))
    lose_replies()
    second = run(later)
    assert second.json("summary.json")["status"] == "completed"
    books = by_dataset(ledger_entries())
    assert len(books) == 2
    for book in books.values():
        assert [entry.round for entry in book] == [1, 2, 2, 3]
        assert {entry.run for entry in book} == {first.folder.name}
        noise = [entry.release.noise_multiplier for entry in book]
        assert noise[0] == noise[1] < noise[2] == noise[3]
        assert epsilon([entry.release for entry in book], DELTA) <= EPSILON
    assert second.rows[-1]["epsilon_max"] <= EPSILON


def test_a_repeated_round_starts_where_its_first_try_did(tiny, rounds):
    config = tiny(**open_run() | {"privacy.noise": "seeded"})
    _, later = interrupted(config, 2, fault=crash_after_training(2, clients=2))
    lose_replies()
    run(later)
    tries = [r for r in rounds if r.t == 2]
    first, again = tries[:2], tries[2:]
    assert len(first) == len(again) == 2
    for before, after in zip(first, again, strict=True):
        assert same_bits(before.start, after.start)


@pytest.mark.parametrize("budget", [EPSILON, INF])
def test_a_finished_run_may_be_resumed_and_stays_what_it_is(tiny, budget):
    config = tiny(**sized(**{"privacy.epsilon": budget}))
    done = run(config)
    before, summary = done.adapter, done.json("summary.json")
    spent = len(ledger_entries())
    again = parse(flatten(config) | {"resume-from": str(done.folder.path)})
    grid = FakeGrid(again, 2)
    server_app.run(grid, again)
    assert grid.trained() == []
    assert len(ledger_entries()) == spent
    assert same_bits(done.adapter, before)
    assert done.json("summary.json") | {"seconds": 0} == summary | {"seconds": 0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.rank", 3),
        ("seed", 7),
        ("method", "rolora"),
        ("privacy.epsilon", 2.0),
        ("privacy.noise", "seeded"),
        ("weighting", "public-size"),
        ("num-server-rounds", 9),
        ("server.average", "ema:0.5"),
        ("train.lr-a", 1e-4),
    ],
)
def test_a_run_is_not_resumed_with_another_config(tiny, key, value):
    config = tiny(**open_run())
    folder = Path(config.output) / "old"
    folder.mkdir(parents=True)
    RunFolder(folder).write_config(config)
    changed = parse(flatten(config) | {"resume-from": str(folder), key: value})
    grid = FakeGrid(changed, 2)
    with pytest.raises(ConfigError) as caught:
        server_app.run(grid, changed)
    message = str(caught.value)
    assert message.startswith(f"{key}={value!r} must be {flatten(config)[key]!r}")
    assert "\n" not in message
    assert grid.trained() == []


def test_the_clock_of_a_resumed_run_goes_on_and_its_eta_is_of_the_session(tiny, caplog):
    config = tiny(**open_run(**{"num-server-rounds": 4}))
    first, later = interrupted(config, 2, before=crash_before(3))
    rows = first.rows
    first.folder.write_history([row | {"elapsed": 5000.0 * row["attempt"]} for row in rows])
    caplog.clear()
    with caplog.at_level("INFO", logger="flwr"):
        second = run(later)
    elapsed = [row["elapsed"] for row in second.rows]
    assert elapsed[:2] == [5000.0, 10_000.0]
    assert 10_000 < elapsed[2] < elapsed[3] < 10_300
    assert elapsed[3] - 1 < second.json("summary.json")["seconds"] < 10_300
    assert int(re.search(r"round 3/4 .* ETA (\d+):", caplog.text)[1]) < 3


def test_epsilon_max_survives_a_resume(tiny):
    config = tiny(**sized())
    first, later = interrupted(config, 2, before=crash_before(3))
    spent = first.rows[-1]["epsilon_max"]
    assert spent > 0
    second = run(later, 2, fault=lambda attempt, partition, reply: reply if not attempt else None)
    assert second.json("summary.json")["epsilon_max"] >= spent


def test_epsilon_max_covers_lost_replies(tiny):
    config = tiny(**sized())
    done = run(config, 2, fault=lambda attempt, partition, reply: reply if attempt < 3 else None)
    books = by_dataset(ledger_entries())
    spent = max(epsilon([entry.release for entry in book], DELTA) for book in books.values())
    assert done.json("privacy.json")["epsilon_max"] >= spent
