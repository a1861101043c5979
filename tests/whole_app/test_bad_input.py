"""Test that bad input is refused in one line, before any training."""

import json
import math
import re
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from helpers.app_runs import INF, ledger_entries, open_run
from helpers.fake_grid import FakeGrid, identify
from lalora_app import server_app
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten
from lalora_app.wire import refusals

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


@pytest.fixture
def refused(tiny):
    """Run a bad config as Flower does; return the one line, after checking that nothing began."""

    def start(changes, nodes=2):
        values = flatten(tiny(**open_run())) | changes
        grid = FakeGrid(values, nodes)
        identify()
        server = Context(1, 1, {}, RecordDict(), values)
        with pytest.raises(ConfigError) as caught:
            server_app.main(grid, server)
        assert grid.trained() == []
        assert ledger_entries() == []
        message = str(caught.value)
        assert "\n" not in message
        assert caught.value.__suppress_context__  # no traceback but Flower's own around the line
        return message

    return start


BAD = {
    "unknown key": ({"lora.rnk": 4}, ["lora.rnk=4", '"lora.rank"']),
    "mistyped": ({"lora.rank": "8"}, ["lora.rank='8'", "int"]),
    "a fraction for a count": ({"seed": 1.5}, ["seed=1.5", "int"]),
    "boolean for a number": ({"privacy.epsilon": True}, ["privacy.epsilon=True", "float"]),
    "zero epsilon": ({"privacy.epsilon": 0.0}, ["privacy.epsilon=0.0", "greater than 0"]),
    "negative epsilon": ({"privacy.epsilon": -3}, ["privacy.epsilon=-3.0", "greater than 0"]),
    "NaN epsilon": ({"privacy.epsilon": math.nan}, ["privacy.epsilon=nan", "greater than 0"]),
    "delta of 1": ({"privacy.delta": 1.0}, ["privacy.delta=1.0", "(0, 1)"]),
    "delta of one in n": ({"privacy.delta": 1 / 180}, ["privacy.delta", "1/n"]),
    "batch larger than data": ({"train.batch-size": 181}, ["train.batch-size", "at most"]),
    "rank above layer": ({"lora.rank": 17}, ["lora.rank=17", "at most 16"]),
    "unknown method": ({"method": "la-lara"}, ['method="la-lara"', '"la-lora"']),
    "missing model": ({"model.name": "/no/such/model"}, ['model.name="/no/such/model"']),
    "missing data": ({"data.name": "/no/such/data.csv"}, ['data.name="/no/such/data.csv"']),
    "no such column": ({"data.input-column": "body"}, ['data.input-column="body"', "text, label"]),
    "targets nowhere": ({"lora.targets": "nothing"}, ['lora.targets="nothing"', "query"]),
    "targets no Linear": ({"lora.targets": "LayerNorm"}, ['lora.targets="LayerNorm"', "Linear"]),
    "min-replies": ({"min-replies": 3}, ["min-replies=3", "at most 2, the clients per round"]),
    "min-replies of a fraction": (
        {"min-replies": 2, "fraction-train": 0.5},
        ["min-replies=2", "at most 1, the clients per round"],
    ),
    "too few nodes": (
        {"min-clients": 5, "node-timeout": 0.05},
        ["min-clients=5", "which is 2", "node-timeout=0.05"],
    ),
    "no folder to resume": ({"resume-from": "/no/such/run"}, ['resume-from="/no/such/run"']),
    "one step for two factors": (
        {"method": "la-lora-full", "train.local-steps": 1},
        ["train.local-steps=1", "la-lora-full"],
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_before_any_training(case, refused):
    changes, words = BAD[case]
    message = refused(changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "changes", [{"privacy.delta": 0.25}, {"train.batch-size": 181}], ids=lambda c: next(iter(c))
)
def test_a_refusal_names_the_value_too(changes, refused):
    ((key, value),) = changes.items()
    assert f"{key}={value}" in refused(changes)


def test_a_label_outside_the_head_is_one_line(refused, tmp_path):
    path = tmp_path / "three.jsonl"
    rows = [{"text": f"words {i}", "label": i % 3} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    message = refused({"data.name": str(path)})
    assert "data.num-labels=2 must be 3, the number of classes: '0', '1', '2'" in message


def test_an_empty_client_is_one_line(refused):
    changes = {"data.dirichlet-alpha": 1e-3, "train.batch-size": 1, "privacy.delta": 1e-5}
    assert refusals.REFUSALS["data"] in refused(changes, nodes=30)


def test_an_output_that_cannot_be_written_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    output = str(tmp_path / "file" / "out")
    message = refused({"output": output})
    assert f'output="{output}" must be writable' in message


def test_a_run_without_a_checkpoint_cannot_be_resumed(refused, tiny):
    config = tiny(**open_run())
    folder = Path(config.output) / "old"
    folder.mkdir(parents=True)
    RunFolder(folder).write_config(config)
    message = refused({"resume-from": str(folder)})
    assert f'resume-from="{folder}" must hold a checkpoint' in message


def test_unfit_nodes_are_told_before_any_training(refused):
    own = {"data-path": "/no/such/own.csv", "max-epsilon": INF}
    message = refused({}, nodes=[{}, own])
    assert "1 of 2 clients can take part" in message
    assert refusals.REFUSALS["data-path"] in message


def test_a_max_length_beyond_the_model_is_one_line(refused, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"text": f"{'hello ' * 40} {i}", "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    message = refused({"data.name": str(path), "model.max-length": 32})
    assert "model.max-length=32" in message


def test_two_clients_with_one_name_are_told(refused, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"text": f"hello {i}", "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    own = {"data-path": str(path), "max-epsilon": INF}
    twin = own | {"name": "clinic"}
    assert "same name" in refused({}, nodes=[twin, twin, own])


def test_a_node_with_data_of_its_own_and_no_limit_is_told(refused, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "hello", "label": 1}) + "\n", "utf-8")
    assert "node config breaks a law" in refused({}, nodes=[{}, {"data-path": str(path)}])


def test_a_refused_run_leaves_no_folder(refused, tmp_path):
    refused({"min-replies": 3})
    assert not list((tmp_path / "out").glob("*"))


def test_a_run_tells_how_many_test_texts_are_cut(tiny, caplog):
    config = tiny(**open_run(**{"model.max-length": 5, "num-server-rounds": 1}))
    with caplog.at_level("WARNING", "flwr"):
        server_app.run(FakeGrid(config, 2), config)
    found = re.search(r"(\d+) of (\d+) test texts fill model\.max-length=5 tokens", caplog.text)
    assert 0 < int(found[1]) <= int(found[2])
