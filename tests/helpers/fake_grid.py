"""A Grid in process: real ClientApp, real serialisation, and faults on the way back.

The only place of the tests that knows private parts of Flower 1.41: ``TaskIdentity`` (a Message
cannot be built without one) and the serde functions of the wire.
"""

import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import helpers.shared_accounting  # noqa: F401
from lalora_app import client_app
from lalora_app.settings.run_config import Config, flatten

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other are slow

RAISED = 2  # Flower's error code of a ClientApp that raised
SERVER = 1  # node id of the SuperLink

# (attempt, partition, reply) -> what arrives; attempt 0: the query before the run. May raise.
Fault = Callable[[int, int, Message], Message | list[Message] | None]


def identify() -> None:
    """Let this process build Messages, as a running ServerApp may."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = SERVER


def over_the_wire(message: Message) -> Message:
    """Return the message as the other side reads it: only serialisable data comes through."""
    return message_from_proto(message_to_proto(message))


def wire_bytes(message: Message) -> bytes:
    return message_to_proto(message).SerializeToString()


@dataclass
class Exchange:
    """One request, the client's own reply to it, and what the network made of that.

    ``start`` and ``drift`` are all of the server's tensors, with those that the request left out.
    """

    attempt: int
    partition: int
    request: Message
    start: dict[str, np.ndarray] = field(default_factory=dict)
    drift: dict[str, np.ndarray] = field(default_factory=dict)
    reply: Message | None = None
    delivered: list[Message] = field(default_factory=list)

    @property
    def order(self) -> Mapping[str, Any]:
        """The request's config."""
        return self.request.content["config"]


class FakeGrid(Grid):
    """N SuperNodes in this process, with random ids and replies in random order.

    Args:
        config: of the run, checked or flat; every node gets it flat.
        nodes: their number, or one node config each (partition-id and num-partitions are added
            unless there is a data-path).
        fault: sees every reply on its way back.
        before: called with the attempt before its first message is delivered; may raise.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any],
        nodes: int | Sequence[Mapping[str, Any]] = 2,
        *,
        fault: Fault | None = None,
        before: Callable[[int], None] = lambda attempt: None,
    ):
        identify()
        flat = flatten(config) if isinstance(config, Config) else dict(config)
        extras = [{}] * nodes if isinstance(nodes, int) else list(nodes)
        self.fault = fault or (lambda attempt, partition, reply: reply)
        self.before = before
        self.exchanges: list[Exchange] = []
        self.waves: list[int] = []  # the attempt of each wave of messages
        self.contexts: dict[int, Context] = {}
        self.partitions: dict[int, int] = {}
        self._replies: dict[str, list[Message]] = {}
        self._sent: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        self._order = random.Random(secrets.randbits(64))
        for index, extra in enumerate(extras):
            simulated = {"partition-id": index, "num-partitions": len(extras)}
            node_config = dict(extra) if "data-path" in extra else simulated | dict(extra)
            node = secrets.randbits(62) + 2
            context = Context(
                run_id=1,
                node_id=node,
                node_config=node_config,
                state=RecordDict(),
                run_config=dict(flat),
            )
            self.contexts[node] = context_from_proto(context_to_proto(context))
            self.partitions[node] = index

    def trained(self, attempt: int | None = None) -> list[Exchange]:
        """Return the exchanges of train messages, of one attempt or of all."""
        asked = [e for e in self.exchanges if e.request.metadata.message_type == "train"]
        return [e for e in asked if attempt in (None, e.attempt)]

    def replies(self) -> list[Message]:
        """Return everything that any client has ever sent, as it was before any fault."""
        return [e.reply for e in self.exchanges if e.reply is not None]

    def _whole(self, node: int, record: str, request: Message) -> dict[str, np.ndarray]:
        """Return what a node was sent last of each tensor."""
        sent = request.content.array_records.get(record, {})
        arrays = {name: array.numpy() for name, array in sent.items()}
        self._sent[node, record] = self._sent.get((node, record), {}) | arrays
        return self._sent[node, record]

    def _deliver(self, message: Message, message_id: str) -> None:
        message.metadata.__dict__["_message_id"] = message_id
        request = over_the_wire(message)
        node = request.metadata.dst_node_id
        attempt = int(request.metadata.group_id or 0)
        exchange = Exchange(attempt, self.partitions[node], request)
        self.exchanges.append(exchange)
        exchange.start = self._whole(node, "arrays", request)
        exchange.drift = self._whole(node, "drift", request)
        try:
            reply = client_app.app(over_the_wire(message), self.contexts[node])
        except Exception as error:  # as Flower does: the exception's text goes to the server
            reply = Message(Error(RAISED, f"{type(error)}:<{error!r}>"), reply_to=request)
        exchange.reply = over_the_wire(reply)
        on_its_way = over_the_wire(reply)
        on_its_way.__dict__["asked"] = request  # for faults of one stage of a wave
        arrived = self.fault(attempt, exchange.partition, on_its_way)
        if not isinstance(arrived, list):
            arrived = [] if arrived is None else [arrived]
        exchange.delivered = [over_the_wire(m) for m in arrived]
        self._replies[message_id] = exchange.delivered

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        checked = sum(message.metadata.dst_node_id in self.contexts for message in messages)
        outgoing = list(messages)
        assert len(outgoing) == checked, "Flower's grid goes through the messages twice"
        for attempt in sorted({int(m.metadata.group_id or 0) for m in outgoing}):
            self.before(attempt)
            self.waves.append(attempt)
        ids = [secrets.token_hex(8) for _ in outgoing]
        for message, message_id in zip(outgoing, ids, strict=True):
            self._deliver(message, message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = [m for message_id in message_ids for m in self._replies.pop(message_id)]
        self._order.shuffle(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> set[int]:
        return set(self.contexts)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("deprecated in Flower; the app builds its Messages itself")

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError
