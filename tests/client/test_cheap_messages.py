"""Messages that need no model import neither torch nor the other libraries of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto

from conftest import written
from helpers.app_runs import DELTA, INF, contents, open_run, sized
from helpers.fake_grid import FakeGrid, over_the_wire
from helpers.message_process import Case, answered
from lalora_app import server_app
from lalora_app.wire import messages
from lalora_app.wire.downlink import LEFT_OUT

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
WAVES = ("train.advertise", "train.share", "train.unmask")


def copied(context: Context) -> Context:
    return context_from_proto(context_to_proto(context))


class RecordingGrid(FakeGrid):
    """It keeps every request with the context of its site as it was before."""

    def _deliver(self, message: Message, message_id: str) -> None:
        before = copied(self.contexts[message.metadata.dst_node_id])
        super()._deliver(message, message_id)
        request = over_the_wire(message)
        self.kept = [*getattr(self, "kept", []), (request, before)]

    def of_kind(self, kind: str) -> list[tuple[Message, Context]]:
        return [
            (over_the_wire(m), copied(c)) for m, c in self.kept if m.metadata.message_type == kind
        ]


def own_sites(tmp_path, count: int, **more):
    texts = [f"free call {i}" if i % 2 else f"see you {i}" for i in range(180)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    own = {"delta": DELTA, "max-epsilon": INF, **more}
    return [
        {
            **own,
            "name": f"site-{i}",
            "data-path": str(written(tmp_path / f"own-{i}.jsonl", rows)),
            "state-path": str(tmp_path / f"state-{i}"),
        }
        for i in range(count)
    ]


@dataclass
class Recorded:
    """A finished run of sites with own data, in folders of its own."""

    grid: RecordingGrid
    folder: Path

    def case(self, name: str, kind: str, place: int = -1, **node) -> Case:
        message, context = self.grid.of_kind(kind)[place]
        context.node_config |= node
        return Case(self.folder / "messages" / name, message, context)


@pytest.fixture
def recorded(tiny, tmp_path) -> Callable[..., Recorded]:
    def make(config, count: int) -> Recorded:
        grid = RecordingGrid(config, own_sites(tmp_path, count))
        server_app.run(grid, config)
        return Recorded(grid, tmp_path)

    return make


def moved(message: Message) -> Message:
    """The request with one other number: it has no saved reply."""
    arrays = dict(message.content[messages.ARRAYS])
    name = sorted(arrays)[0]
    arrays[name] = Array(arrays[name].numpy() + np.float32(1e-6))
    content = RecordDict({**message.content, messages.ARRAYS: ArrayRecord(arrays)})
    return Message(content, dst_node_id=message.metadata.dst_node_id, message_type="train")


def test_repeated_answers_and_refusals_import_no_library_of_a_model(tiny, tmp_path, recorded):
    one = {"min-clients": 1, "min-replies": 1, "num-server-rounds": 1}
    run = recorded(tiny(**sized(1, **one)), 1)
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


def test_waves_of_secure_aggregation_import_no_library_of_a_model(tiny, recorded):
    on = {"secure-aggregation": "secagg+", "num-server-rounds": 1, "min-clients": 3}
    run = recorded(tiny(**open_run(3, **on)), 3)
    waves = [run.case(kind, kind, 0) for kind in WAVES]
    stage = run.case("stage", "train", 0)
    stage.context.state = RecordDict()
    heavy, _ = answered([*waves, stage])
    assert heavy == [[]] * 4
    assert [case.refusal for case in waves] == [None] * 3
    assert stage.refusal == "stage"


def test_a_message_that_trains_does_import_them(tiny, recorded):
    """The list of the other tests is not empty for want of looking."""
    one = {"min-clients": 1, "min-replies": 1, "num-server-rounds": 1}
    run = recorded(tiny(**open_run(1, **one)), 1)
    case = run.case("train", "train")
    case.message = moved(case.message)
    heavy, log = answered([case])
    assert case.refusal is None, log
    assert set(heavy[0]) >= {"torch", "transformers", "peft"}


def test_a_limit_is_checked_before_the_model_only_while_the_data_is_the_same(tiny, recorded):
    """Rows that were added change the sampling rate, so their number is read again."""
    one = {"min-clients": 1, "min-replies": 1, "num-server-rounds": 1}
    run = recorded(tiny(**sized(1, **one)), 1)
    case = run.case("budget", "train", **{"max-epsilon": 0.01})
    case.message = moved(case.message)
    with Path(case.context.node_config["data-path"]).open("a") as file:
        file.write('{"text": "hello friend", "label": 0}\n')
    heavy, _ = answered([case])
    assert case.refusal == "budget"
    assert "torch" in heavy[0]
