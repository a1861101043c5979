"""Messages that need no model import neither torch nor the other libraries of a model."""

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from helpers.app_runs import DELTA, contents, open_run, sized
from helpers.message_process import answered
from helpers.recorded_messages import moved, recorded
from lalora_app.wire import messages
from lalora_app.wire.downlink import LEFT_OUT

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


def test_repeated_answers_and_refusals_import_no_library_of_a_model(tiny, tmp_path):
    one = {"min-clients": 1, "min-replies": 1, "num-server-rounds": 1}
    run = recorded(tiny(**sized(1, **one)), 1, tmp_path)
    policy = tmp_path / "policy.toml"
    policy.write_text(f'max-epsilon = 50.0\ndelta = {DELTA}\nmethods = ["rolora"]\n')
    last = run.case("repeated", "train")
    cases = {
        "policy": run.case("policy", "train", policy=str(policy)),
        "held": run.case("held", "train"),
        "config": run.case("config", "train", device="none such"),
        "budget": run.case("budget", "train", **{"max-epsilon": 0.01}),
        "request": run.case("request", "train"),
    }
    for key in ("max-epsilon", "delta"):
        del cases["policy"].context.node_config[key]
    cases["held"].message.content[LEFT_OUT] = ConfigRecord({"A": "0" * 64})
    cases["budget"].message = moved(cases["budget"].message)
    del cases["request"].message.content[messages.CONFIG]["attempt"]
    heavy, log = answered([last, *cases.values()])
    assert heavy == [[]] * (1 + len(cases))
    assert {name: case.refusal for name, case in cases.items()} == {name: name for name in cases}
    assert contents(last.reply) == contents(run.grid.trained()[-1].reply), log
    sent, again = (m.content[messages.ARRAYS] for m in (run.grid.trained()[-1].reply, last.reply))
    assert {n: a.data for n, a in sent.items()} == {n: a.data for n, a in again.items()}
    assert dict(last.reply.content[messages.METRICS]) == dict(
        run.grid.trained()[-1].reply.content[messages.METRICS]
    )


def test_waves_of_secure_aggregation_import_no_library_of_a_model(tiny, tmp_path):
    on = {"secure-aggregation": "secagg+", "num-server-rounds": 1, "min-clients": 3}
    run = recorded(tiny(**open_run(3, **on)), 3, tmp_path)
    kept = run.grid.of_kind("train.secagg")
    stages = ("advertise", "share", "unmask")
    places = [[kind in message.content for message, _ in kept].index(True) for kind in stages]
    waves = [run.case(kind, "train.secagg", at) for kind, at in zip(stages, places, strict=True)]
    stage = run.case("stage", "train", 0)
    stage.context.state = RecordDict()
    heavy, _ = answered([*waves, stage])
    assert heavy == [[]] * 4
    for kind, case in zip(stages, waves, strict=True):
        assert "refusal" not in case.reply.content[kind]
    assert stage.refusal == "stage"


def test_a_message_that_trains_does_import_them(tiny, tmp_path):
    """The list of the other tests is not empty for want of looking."""
    one = {"min-clients": 1, "min-replies": 1, "num-server-rounds": 1}
    run = recorded(tiny(**open_run(1, **one)), 1, tmp_path)
    case = run.case("train", "train")
    case.message = moved(case.message)
    heavy, log = answered([case])
    assert case.refusal is None, log
    assert set(heavy[0]) >= {"torch", "transformers", "peft"}


def test_a_limit_is_checked_before_the_model_only_while_the_data_is_the_same(tiny, tmp_path):
    """Rows that were added change the sampling rate, so their number is read again."""
    one = {"min-clients": 1, "min-replies": 1, "num-server-rounds": 1}
    run = recorded(tiny(**sized(1, **one)), 1, tmp_path)
    case = run.case("budget", "train", **{"max-epsilon": 0.01})
    case.message = moved(case.message)
    with Path(case.context.node_config["data-path"]).open("a") as file:
        file.write('{"text": "hello friend", "label": 0}\n')
    heavy, _ = answered([case])
    assert case.refusal == "budget"
    assert "torch" in heavy[0]
