"""Waves of messages at the server: one message per client, with stages of up to three attempts.

A stage that fails for a client costs that client the attempt of the stage, and no other attempt.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lalora_app.secagg.messages import KEYS_MESSAGE, stage_reply
from lalora_app.wire.messages import content_or_raise
from lalora_app.wire.tensors import WireError


@dataclass(frozen=True)
class Part:
    """One stage of one attempt, as a part of a wave.

    Attributes:
        stage: name of the stage.
        records: the request's record per node.
        read: function that reads the record of a reply of a node.
        drop_reasons: list that gets one sentence per refused or missing reply.
    """

    stage: str
    records: Mapping[int, ConfigRecord]
    read: Callable[[ConfigRecord, int], None]
    drop_reasons: list[str]

    def _read_reply(self, message: Message) -> None:
        """Read one reply; an invalid reply is dropped and does not end the attempt."""
        try:
            if message.has_error():
                content_or_raise(message)
            self.read(stage_reply(message, self.stage), message.metadata.src_node_id)
        except WireError as error:
            self.drop_reasons.append(f"{self.stage}: {error}")

    def read_replies(self, replies: Iterable[Message]) -> None:
        """Read this stage's record of each reply of a node that was asked for it.

        Flower's own error messages do not name their node, and are counted in every stage.
        """
        asked = [m for m in replies if m.has_error() or m.metadata.src_node_id in self.records]
        for message in asked:
            self._read_reply(message)
        if (missing := len(self.records) - len(asked)) > 0:
            self.drop_reasons.append(f"{self.stage}: {missing} did not answer in time")


def add_parts(parts: Iterable[Part], attempt: int, requests: Iterable[Message]) -> list[Message]:
    """Return the messages of a wave.

    Args:
        parts: the stages of the wave.
        attempt: the present attempt.
        requests: messages of the wave that get the records; a node without one gets a new message.
    """
    messages = {request.metadata.dst_node_id: request for request in requests}
    records = [(part.stage, *pair) for part in parts for pair in part.records.items()]
    for stage, node, record in records:
        if node not in messages:
            messages[node] = Message(
                RecordDict(),
                dst_node_id=node,
                message_type=KEYS_MESSAGE,
                group_id=str(attempt),
            )
        messages[node].content[stage] = record
    return list(messages.values())


def exchange(parts: Iterable[Part], attempt: int, grid: Grid, timeout: float) -> None:
    """Send a wave of stages only, and read the replies.

    Args:
        parts: the stages of the wave. Limit: without any, no message is sent.
        attempt: the present attempt.
        grid: Flower's connection to the clients.
        timeout: largest duration of the wave in seconds.
    """
    parts = list(parts)
    messages = add_parts(parts, attempt, [])
    replies = list(grid.send_and_receive(messages, timeout=timeout)) if messages else []
    for part in parts:
        part.read_replies(replies)
