"""Test reading finished runs and grouping them."""

import json
import math
import re

import pytest

from conftest import defaults, make_config
from helpers.made_up_runs import a_row, record
from lalora_app.reports.charts import all_charts as all_charts
from lalora_app.results.finished_run import group, read_record
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError


def leave(folder, config, **summary) -> RunFolder:
    """A run's folder as a run leaves it."""
    run = RunFolder(folder)
    folder.mkdir()
    run.write_config(config)
    run.write_json("summary.json", {"method": config.method, **summary})
    run.write_json("privacy.json", {"unit": "one example", "accountant": "PRV"})
    run.write_history(
        [a_row(1, 0.9, config.privacy.epsilon), a_row(2, 0.95, config.privacy.epsilon)]
    )
    return run


@pytest.mark.parametrize("epsilon", [3.0, math.inf])
def test_a_record_is_what_the_run_left(tmp_path, epsilon):
    run = leave(
        tmp_path / "run",
        make_config(**{"privacy.epsilon": epsilon, "seed": 5}),
        epsilon_max=epsilon,
    )
    partition = {"labels": ["ham", "spam"], "clients": [[3, 1], [2, 2], [0, 4]]}
    (run.path / "partition.json").write_text(json.dumps(partition))
    found = read_record(run.path)
    assert (found.label, found.method, found.epsilon, found.seed) == (
        "la-lora",
        "la-lora",
        epsilon,
        5,
    )
    assert found.summary["epsilon_max"] == epsilon
    assert found.history == run.history()
    assert (found.partition, found.clients) == (partition, 3)
    assert found.config["lora.rank"] == defaults()["lora.rank"]
    assert found.private == math.isfinite(epsilon)
    assert read_record(run.path, label="mine").label == "mine"


def test_a_run_without_a_partition_or_a_key_of_today_is_read(tmp_path):
    run = leave(tmp_path / "run", make_config())
    path = run.path / "config.toml"
    path.write_text(
        "".join(
            line for line in path.read_text().splitlines(True) if not line.startswith("lora.kernel")
        )
    )
    found = read_record(run.path)
    assert (found.partition, found.clients) == (None, None)
    assert "lora.kernel" not in found.config


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "privacy.json", "history.jsonl"])
@pytest.mark.parametrize("harm", ["missing", "broken"])
def test_an_unfinished_run_is_refused_by_its_folder(tmp_path, name, harm):
    run = leave(tmp_path / "run", make_config())
    (run.path / name).unlink() if harm == "missing" else (run.path / name).write_text("{")
    with pytest.raises(ConfigError, match=re.escape(f"{run.path} must hold a finished run")):
        read_record(run.path)


def test_groups_begin_with_the_smallest_epsilon_and_keep_the_order_of_labels():
    runs = [record("b", math.inf), record("b", 1.0, 1), record("a", 1.0), record("b", 1.0, 0)]
    found = group(runs)
    assert list(found) == [("b", 1.0), ("a", 1.0), ("b", math.inf)]
    assert [run.seed for run in found["b", 1.0]] == [0, 1]
