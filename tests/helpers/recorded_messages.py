"""Requests of a finished run, to be answered again by processes of their own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto

from conftest import written
from helpers.app_runs import DELTA, INF
from helpers.fake_grid import FakeGrid, over_the_wire
from helpers.message_process import Case
from lalora_app import server_app
from lalora_app.settings.run_config import Config
from lalora_app.wire import messages


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


def recorded(config: Config, count: int, folder: Path) -> Recorded:
    grid = RecordingGrid(config, own_sites(folder, count))
    server_app.run(grid, config)
    return Recorded(grid, folder)


def moved(message: Message) -> Message:
    """The request with one other number: it has no saved reply."""
    arrays = dict(message.content[messages.ARRAYS])
    name = sorted(arrays)[0]
    arrays[name] = Array(arrays[name].numpy() + np.float32(1e-6))
    content = RecordDict({**message.content, messages.ARRAYS: ArrayRecord(arrays)})
    return Message(content, dst_node_id=message.metadata.dst_node_id, message_type="train")
