"""Test resumed runs, restarted nodes and refused configs under secure aggregation."""

from functools import partial

import pytest
from flwr.app import Context, RecordDict

from helpers import app_runs
from helpers.app_runs import crash_before, fresh, interrupted, open_run, run, same_bits
from helpers.fake_grid import FakeGrid
from helpers.secure_runs import CLIENTS, ON, stages_of
from helpers.simulation_runs import run_toml, summaries
from lalora_app import server_app
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.table import METHODS
from lalora_app.settings.errors import ConfigError
from lalora_app.wire.refusals import REFUSALS

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny, tmp_path, monkeypatch):
    changes = ON | {
        "method": "la-lora",
        "privacy.noise": "seeded",
        "num-server-rounds": 4,
        "train.batch-size": 6,
    }
    whole = run(fresh(tiny, tmp_path, monkeypatch, "whole", **changes), CLIENTS)
    config = fresh(tiny, tmp_path, monkeypatch, "halves", **changes)
    first, later = interrupted(config, CLIENTS, before=crash_before(3))
    second = run(later, CLIENTS)
    assert second.folder.path == first.folder.path
    assert same_bits(second.adapter, whole.adapter)
    assert [row["aggregated"] for row in second.rows] == [True] * 4


def test_a_restarted_supernode_is_left_behind_and_comes_back(tiny):
    """Its keys were in memory only: it refuses, and takes part again with its next keys."""
    grid = None

    def fault(attempt, partition, reply):
        if partition == 1 and stages_of(reply.asked).get("unmask") == 1:
            (node,) = (n for n, p in grid.partitions.items() if p == partition)
            old = grid.contexts[node]
            grid.contexts[node] = Context(
                old.run_id, old.node_id, old.node_config, RecordDict(), old.run_config
            )
        return reply

    config = tiny(**open_run(CLIENTS) | ON | {"num-server-rounds": 4})
    grid = FakeGrid(config, CLIENTS, fault=fault)
    server_app.run(grid, config)
    rows = app_runs.run_folder(config).history()
    assert [row["replies"] for row in rows] == [4, 3, 3, 4]
    told = f"refused: {REFUSALS['stage']}"
    assert [row["dropped"] for row in rows] == [[], [told], [f"share: {told}"], []]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "flora"}, ['secure-aggregation="secagg+"', "flora", "each client's factors"]),
        ({"robust": "median"}, ['robust="median"', '"none"', "only their sum"]),
        ({"weighting": "public-size"}, ['weighting="public-size"', '"uniform"', "plain sum"]),
        ({"min-replies": 1}, ["min-replies=1", "at least 2", "is that upload"]),
        ({"lora.ranks": "1,2"}, ['lora.ranks="1,2"', '"none"']),
    ],
)
def test_what_a_sum_is_not_enough_for_is_refused_before_the_run(tiny, changes, words):
    config = tiny(**ON | changes)
    grid = FakeGrid(config, 2)
    with pytest.raises(ConfigError) as caught:
        server_app.run(grid, config)
    assert all(word in str(caught.value) for word in words), caught.value
    assert grid.exchanges == []


def test_every_linear_method_may_run_and_no_other(tiny):
    for name, method in METHODS.items():
        build = partial(tiny, method=name)
        if method.linear:
            assert method_of(build(**ON)) is method
        else:
            with pytest.raises(ConfigError, match=name):
                method_of(build(**ON))


@pytest.mark.slow
@pytest.mark.quiet
def test_a_simulated_run_keeps_its_keys_between_messages(tiny, tmp_path):
    """Ray's actors keep nothing; what a stage leaves for the next is in Flower's context."""
    config = tiny(**ON | {"num-server-rounds": 2})
    assert run_toml(config, tmp_path) == 0
    (summary,) = summaries(config)
    assert summary["status"] == "completed"
    assert summary["epsilon_max"] <= config.privacy.epsilon
    for row in app_runs.run_folder(config).history():
        assert (row["replies"], row["dropped"], row["update_cosine"]) == (2, [], None)
