"""A whole run on data whose labels are names."""

import json
import logging

import pytest

from helpers.app_runs import open_run, run
from lalora_app.results.run_folder import read_config
from lalora_app.wire import messages

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


@pytest.fixture
def named(tmp_path):
    """A file of 120 texts with the labels "spam", "ham" and, in two rows, "rare"."""
    labels = ["spam", "ham"] * 59 + ["rare"] * 2
    rows = [{"text": f"hello {i} you", "label": label} for i, label in enumerate(labels)]
    path = tmp_path / "named.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_the_names_reach_every_client_and_every_result(named, tiny, caplog):
    keys = {"data.name": named, "data.num-labels": 0, "train.batch-size": 8, "num-server-rounds": 1}
    with caplog.at_level(logging.WARNING, "flwr"):
        done = run(tiny(**open_run() | keys))
    saved = read_config(done.folder.path)
    assert (saved.data.labels, saved.data.num_labels) == ("ham,rare,spam", 3)
    for exchange in done.grid.trained(1):
        sent = messages.run_config_of(exchange.request.content)
        assert sent["data.labels"] == "ham,rare,spam"
    partition = done.json("partition.json")
    assert partition["labels"] == ["ham", "rare", "spam"]
    counts = [sum(client[i] for client in partition["clients"]) for i in range(3)]
    assert counts[1] <= 2
    if counts[1] == 2:  # then the test split has no "rare"
        assert "no public test example has a label of 1 of 3 classes: 'rare'" in caplog.text
    else:
        assert "no public test example" not in caplog.text


def test_a_class_that_never_occurs_is_warned_of(tiny, caplog):
    keys = {"data.num-labels": 3, "num-server-rounds": 1}
    with caplog.at_level(logging.WARNING, "flwr"):
        done = run(tiny(**open_run() | keys))
    assert "no public test example has a label of 1 of 3 classes: '2'" in caplog.text
    assert done.json("partition.json")["labels"] == ["0", "1", "2"]
