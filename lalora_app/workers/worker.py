"""One worker process: it runs the ClientApp for one message after another.

Backbone, data and accountants stay in its memory between messages, as the app caches them.
"""

import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from lalora_app import client_app
from lalora_app.workers import flower_names

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Place:
    """Where a worker process computes.

    Attributes:
        threads: the largest number of torch's threads.
        gpu: the only visible GPU, as ``CUDA_VISIBLE_DEVICES`` names it; "": nothing is changed.
    """

    threads: int
    gpu: str = ""


@dataclass(frozen=True)
class Task:
    """One message for one node.

    Attributes:
        node: the node's id.
        node_config: its node config.
        state: the bytes of its context's state.
        message: the bytes of the message.
    """

    node: int
    node_config: dict[str, int | str]
    state: bytes
    message: bytes


def answer(task: Task, run_config: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Return the bytes of the ClientApp's reply, and of the node's state after it.

    A ClientApp that raises leaves the state as it was, as in Flower's simulation.
    """
    message = flower_names.message_from_bytes(task.message)
    context = flower_names.new_context(task.node, task.node_config, dict(run_config))
    flower_names.load_state(context, task.state)
    try:
        reply = client_app.app(message, context)
    except Exception as error:
        _log.exception("LaLoRA the ClientApp raised")
        reason = f"{type(error)}:<{error!r}>"
        reply = flower_names.error_reply(message, flower_names.RAISED, reason)
        return flower_names.message_to_bytes(reply), task.state
    return flower_names.message_to_bytes(reply), flower_names.state_to_bytes(context)


def serve(connection: Connection, place: Place, run_config: Mapping[str, Any]) -> None:
    """Answer tasks until the other end of the connection is closed.

    The main function of a worker process.

    Args:
        connection: receives a :class:`Task`, and sends what :func:`answer` returns.
        place: where the process computes.
        run_config: the app's flat config, the same for all nodes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which ends all
    if place.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # before CUDA is used for the first time
    torch.set_num_threads(min(torch.get_num_threads(), place.threads))
    flower_names.identify()
    try:
        while True:
            connection.send(answer(connection.recv(), run_config))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the other end is closed: the run is over
