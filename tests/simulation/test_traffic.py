"""The planned bytes are those of a real run."""

import pytest

from helpers.app_runs import open_run, run
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import build
from lalora_app.simulation.traffic import traffic

METHODS = ["dp-lora", "la-lora", "rolora", "ffa-lora", "fedsa-lora", "fedsvd"]


HEAD_FIRST = {"train.head-rounds": 1, "model.head": "class-means", "num-server-rounds": 5}


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in METHODS), ("rolora", HEAD_FIRST), ("fedsa-lora", HEAD_FIRST)],
)
@pytest.mark.usefixtures("no_waiting", "no_report")
def test_the_bytes_of_a_plan_are_those_of_the_runs_history(name, more, tiny):
    config = tiny(**open_run(method=name) | more)
    start = build(config)[1]
    rows = run(config).rows
    up, down = traffic(method_of(config), start, config).per_round(len(rows))
    assert up == pytest.approx(sum(row["upload_bytes"] for row in rows) / len(rows))
    assert down == pytest.approx(sum(row["download_bytes"] for row in rows) / len(rows))
