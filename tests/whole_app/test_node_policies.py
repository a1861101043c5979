"""Test the limits, the device and the data of single nodes."""

import json
import math
from collections import Counter

import pytest
from flwr.app import Message, RecordDict

from helpers.app_runs import DELTA, EPSILON, by_dataset, ledger_entries, open_run, run, sized
from helpers.fake_grid import FakeGrid
from lalora_app import client_app, server_app
from lalora_app.models import backbone
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.ledger import Ledger
from lalora_app.privacy.ledger_entries import releases_drawn, releases_of
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten
from lalora_app.wire import messages

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


def test_a_node_with_a_smaller_budget_refuses_and_the_others_go_on(tiny):
    nodes = [{}, {"max-epsilon": EPSILON / 2, "delta": DELTA}, {}]
    done = run(tiny(**sized(3) | {"num-server-rounds": 1, "train.local-steps": 6}), nodes)
    for exchange in done.grid.trained():
        refused = exchange.reply.content["config"].get("refusal")
        assert refused == ("budget" if exchange.partition == 1 else None)
    assert all(row["aggregated"] and row["replies"] == 2 for row in done.rows)
    assert {tuple(row["dropped"]) for row in done.rows} == {
        (f"refused: {messages.REFUSALS['budget']}",)
    }
    books = by_dataset(ledger_entries())
    assert sorted(dataset.split()[-1] for dataset in books) == ["0/3", "2/3"]


def test_a_nodes_lifetime_budget_counts_over_runs(tiny):
    nodes = [{}, {"max-epsilon": 1.1 * EPSILON, "delta": DELTA}, {}]
    config = tiny(**sized(3) | {"num-server-rounds": 1, "train.local-steps": 6})
    first, second = FakeGrid(config, nodes), FakeGrid(config, nodes)
    for grid in (first, second):
        server_app.run(grid, config)
    answered = [
        [e for e in grid.trained() if e.partition == 1 and messages.ARRAYS in e.reply.content]
        for grid in (first, second)
    ]
    assert [len(exchanges) for exchanges in answered] == [1, 0]


def test_a_nodes_own_device_goes_before_the_runs(tiny, monkeypatch):
    built, honest = Counter(), backbone.build

    def spy(config):
        built[config.model.device] += 1
        return honest(config)

    monkeypatch.setattr(backbone, "build", spy)
    run(tiny(**open_run() | {"num-server-rounds": 1}), [{"device": "cpu"}, {}])
    assert built["cpu"] == 2  # to answer the query, and in the round


@pytest.mark.parametrize("noise", ["secure", "seeded"])
def test_the_ledger_marks_seeded_noise(tiny, noise):
    done = run(tiny(**sized(**{"privacy.noise": noise})))
    entries = ledger_entries()
    assert [entry.seeded for entry in entries] == [noise == "seeded"] * 6
    for lines in by_dataset(entries).values():
        assert epsilon(releases_drawn(lines), DELTA) <= EPSILON
        assert math.isinf(epsilon(releases_of(lines), DELTA)) == (noise == "seeded")
    assert done.rows[-1]["epsilon_max"] <= EPSILON + 0.01  # of the schedule


def test_a_node_with_a_budget_takes_no_noise_that_the_server_can_repeat(tiny):
    config = tiny(**sized(2) | {"privacy.noise": "seeded"})
    nodes = [{}, {"max-epsilon": 5.0, "delta": DELTA}]
    grid = FakeGrid(config, nodes)
    with pytest.raises(ConfigError, match="1 of 2 clients can take part"):
        server_app.run(grid, config)
    assert ledger_entries() == []
    # Nor when it is asked for in the message of a run that began otherwise.
    honest = tiny(**sized(2))
    grid = FakeGrid(honest, nodes)
    server_app.run(grid, honest)
    (exchange,) = [e for e in grid.trained(1) if e.partition == 1]
    before = len(ledger_entries())
    content = RecordDict(dict(exchange.request.content))
    content[messages.RUN_CONFIG] = messages.run_config(flatten(config))
    (node,) = [n for n, index in grid.partitions.items() if index == 1]
    forged = Message(content, dst_node_id=node, message_type="train")
    reply = client_app.app(forged, grid.contexts[node])
    assert reply.content["config"]["refusal"] == "policy"
    assert messages.ARRAYS not in reply.content
    assert len(ledger_entries()) == before


BAD_POLICIES = [
    {"max-epsilon": 5.0},  # without its delta
    {"max-epsilon": "1", "delta": DELTA},
    {"max-epsilon": 0.0, "delta": DELTA},
    {"max-epsilon": -1, "delta": DELTA},
    {"max-epsilon": float("nan"), "delta": DELTA},
    {"max-epsilon": 5.0, "delta": 1.5},
    {"max-epsilon": True, "delta": DELTA},
    {"device": "tpu"},
]


@pytest.mark.parametrize("policy", BAD_POLICIES)
def test_a_node_config_that_breaks_a_law_is_told_before_any_training(tiny, policy):
    config = tiny(**open_run() | {"num-server-rounds": 1})
    grid = FakeGrid(config, [policy, {}, {}])
    with pytest.raises(ConfigError, match="node config breaks a law"):
        server_app.run(grid, config)
    assert grid.trained() == []
    assert ledger_entries() == []


def test_real_clients_bring_their_own_files(tiny, tmp_path):
    nodes = []
    for index in range(2):
        path = tmp_path / f"own-{index}.jsonl"
        rows = [{"text": f"hello {index} {i}", "label": i % 2} for i in range(60 + 20 * index)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        home = {"state-path": str(tmp_path / f"state-{index}")}
        limit = {"max-epsilon": float("inf")}
        nodes.append({"data-path": str(path), "name": f"clinic {index}", **home, **limit})
    nodes[0]["dataset-id"] = "mail of 2026"
    done = run(tiny(**open_run()), nodes)
    names = {e.reply.content["config"]["client"] for e in done.grid.exchanges if not e.attempt}
    assert names == {"clinic 0", "clinic 1"}
    for index, dataset in enumerate(["mail of 2026", f"file {nodes[1]['data-path']}"]):
        entries = Ledger(tmp_path / f"state-{index}" / "ledger.sqlite").entries()
        assert {entry.dataset for entry in entries} == {dataset}
        assert {entry.release.sampling_rate for entry in entries} == {12 / (60 + 20 * index)}
    assert ledger_entries() == []
