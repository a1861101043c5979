"""Messages for a process of its own, as a SuperNode starts one per message.

python message_process.py FOLDER...    answers the message in each folder, in this order

A folder holds ``message`` and ``context``; the process adds ``reply`` and ``context-after``, and
prints one line of JSON per message: the heavy libraries that it has imported by then.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

HEAVY = ("torch", "transformers", "peft", "opacus", "datasets", "timm", "torchvision")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Case:
    """A message, and the context in which a site gets it."""

    folder: Path
    message: Message
    context: Context
    environment: Mapping[str, str] = field(default_factory=dict)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "message").write_bytes(message_to_proto(self.message).SerializeToString())
        (self.folder / "context").write_bytes(context_to_proto(self.context).SerializeToString())

    @property
    def reply(self) -> Message:
        return read_message(self.folder / "reply")

    @property
    def after(self) -> Context:
        return read_context(self.folder / "context-after")

    @property
    def refusal(self) -> str | None:
        return self.reply.content["config"].get("refusal")


def read_message(path: Path) -> Message:
    return message_from_proto(MessageProto.FromString(path.read_bytes()))


def read_context(path: Path) -> Context:
    return context_from_proto(ContextProto.FromString(path.read_bytes()))


def start(cases: Sequence[Case], **options: Any) -> subprocess.Popen:
    """Start one process that answers the cases in turn."""
    for case in cases:
        case.write()
    words = [sys.executable, __file__, *(str(case.folder) for case in cases)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, **cases[0].environment}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def answered(cases: Sequence[Case]) -> tuple[list[list[str]], str]:
    """Return the heavy libraries after each message, and the log of the process."""
    process = start(cases)
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")], log


def main() -> None:
    from lalora_app import client_app

    if "DIE_AT" in os.environ:
        from helpers.site_worker_process import patch

        patch(os.environ["DIE_AT"], Path(os.environ["MARK"]))
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    for folder in map(Path, sys.argv[1:]):
        context = read_context(folder / "context")
        reply = client_app.app(read_message(folder / "message"), context)
        (folder / "context-after").write_bytes(context_to_proto(context).SerializeToString())
        (folder / "reply").write_bytes(message_to_proto(reply).SerializeToString())
        print(json.dumps([name for name in HEAVY if name in sys.modules]), flush=True)


if __name__ == "__main__":
    main()
