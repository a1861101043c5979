"""The Grid of a ServerApp whose clients are simulated in worker processes."""

import secrets
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from lalora_app.workers import flower_names
from lalora_app.workers.worker import Task
from lalora_app.workers.worker_pool import Answer, WorkerPool

_LOST = "the worker process of the client has ended"


class LocalGrid(Grid):
    """Simulated nodes, each with the partition of its index; a node's state is kept here.

    Args:
        pool: the worker processes.
        nodes: the number of nodes.
    """

    def __init__(self, pool: WorkerPool, nodes: int):
        flower_names.identify()
        self._pool = pool
        ids = secrets.SystemRandom().sample(range(2, 2**62), nodes)
        self._states = dict.fromkeys(ids, b"")
        self._configs: dict[int, dict[str, int | str]] = {
            node: {"partition-id": index, "num-partitions": nodes} for index, node in enumerate(ids)
        }
        self._sent: dict[str, Message] = {}  # without a reply so far
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._states)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to their nodes; return their ids."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node, key = message.metadata.dst_node_id, secrets.token_hex(16)
        config = self._configs[node]
        flower_names.set_message_id(message, key)
        self._sent[key] = message

        def make() -> Task:
            data = flower_names.message_to_bytes(message)
            return Task(node, config, self._states[node], data)

        self._pool.submit(key, node, make)
        return key

    def _collect(self, seconds: float | None) -> None:
        for answer in self._pool.collect(seconds):
            self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        """Keep a node's new state, and its reply unless nobody waits for it any more."""
        if answer.result is not None:
            self._states[answer.node] = answer.result[1]
        message = self._sent.pop(answer.key, None)
        if message is None:
            return
        if answer.result is None:
            reply = flower_names.error_reply(message, flower_names.LOST, _LOST)
        else:
            reply = flower_names.message_from_bytes(answer.result[0])
        self._replies[answer.key] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have come to these messages, each once."""
        self._collect(0)
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies that come within ``timeout`` seconds.

        A message that no worker has begun by then is not delivered any more.
        """
        keys = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        while any(key in self._sent for key in keys):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._collect(left)
        self._pool.drop(keys)
        for key in keys:
            self._sent.pop(key, None)
        return [self._replies.pop(key) for key in keys if key in self._replies]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message of this run; Flower's own name for ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Any) -> None:
        """Take no run: there is one only."""

    @property
    def run(self) -> Any:
        """Flower's description of a run, which only a SuperLink has."""
        raise NotImplementedError("a simulation in worker processes has no SuperLink")
