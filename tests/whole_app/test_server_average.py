"""A whole run with an average: what is evaluated, saved and read again is the average."""

import numpy as np
import pytest

from helpers.app_runs import arrays, open_run, run, same_bits
from helpers.server_rules import assert_near, wide
from lalora_app.adapter.factors import factor_pairs, kind
from lalora_app.models.backbone import Backbone
from lalora_app.results.opened_run import open_run as open_finished_run

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
RATES = {"train.lr-a": 0.05, "train.lr-b": 0.05, "train.lr-head": 0.1}


@pytest.fixture
def evaluated(monkeypatch):
    """The adapters that were evaluated, in order."""
    seen, honest = [], Backbone.evaluate

    def spy(model, batches):
        seen.append(model.adapter())
        return honest(model, batches)

    monkeypatch.setattr(Backbone, "evaluate", spy)
    return seen


def after_each_round(done):
    """The global adapter after each round: the start of the next one, and the last."""
    attempts = range(2, done.config.num_server_rounds + 1)
    starts = [done.grid.trained(attempt)[0].start for attempt in attempts]
    return [*starts, done.folder.latest().adapter]


def assert_is_the_average(found, adapters, rank):
    """Plain means of the heads; the best approximation of the mean of the dense products."""
    for b, a in factor_pairs(adapters[0]):
        mean = np.mean([wide(x[b]) @ wide(x[a]) for x in adapters], axis=0)
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert_near(wide(found[b]) @ wide(found[a]), best, relative=1e-5)
        assert found[a].shape == adapters[0][a].shape
    for name in adapters[0]:
        if kind(name) == "head":
            assert_near(found[name], np.mean([wide(x[name]) for x in adapters], axis=0))


@pytest.mark.parametrize("method", ["la-lora", "rolora"])
def test_the_average_of_the_last_rounds_is_evaluated_and_saved(tiny, evaluated, method):
    changes = {"num-server-rounds": 4, "server.average": "tail:0.5"} | RATES
    done = run(tiny(**open_run(method=method) | changes))
    adapters, rank = after_each_round(done), done.config.lora.rank
    assert len(evaluated) == 5  # before the first round, and after each
    assert same_bits(evaluated[1], adapters[0])
    assert same_bits(evaluated[2], adapters[1])
    assert same_bits(evaluated[3], adapters[2])  # an average of one
    assert not same_bits(evaluated[4], adapters[3])
    assert_is_the_average(evaluated[4], adapters[2:], rank)
    assert same_bits(done.adapter, evaluated[4])
    _, model, _ = open_finished_run(done.folder.path)
    assert same_bits(model.adapter(), evaluated[4])


def test_training_goes_on_from_the_rounds_and_not_from_their_average(tiny, tmp_path, monkeypatch):
    changes = {"num-server-rounds": 3, "privacy.noise": "seeded"} | RATES
    runs = []
    for average in ("none", "ema:0.9"):
        monkeypatch.setenv("LALORA_HOME", str(tmp_path / average / "home"))
        own = {"server.average": average, "output": str(tmp_path / average / "out")}
        runs.append(run(tiny(**open_run(method="dp-lora") | changes | own)))
    plain, averaging = runs
    assert same_bits(plain.folder.latest().adapter, averaging.folder.latest().adapter)
    for one, other in zip(plain.grid.trained(), averaging.grid.trained(), strict=True):
        assert same_bits(arrays(one.reply), arrays(other.reply))
    assert not same_bits(plain.adapter, averaging.adapter)
