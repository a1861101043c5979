"""Hand a message over to the site worker; without one, this process answers it.

A message is handed over at most once. From the moment at which it is sent, this process never
trains for it: the site worker may have reserved its releases. If the site worker dies, the reply is
a refusal, as it is an error when the process of a message dies.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, cast

from flwr.app import Context, Message, RecordDict

from lalora_app.client.answers import Handler
from lalora_app.privacy.ledger import state_folder
from lalora_app.site_worker import handshake
from lalora_app.site_worker.handshake import UnusableError
from lalora_app.wire.flower_bytes import (
    context_to_bytes,
    message_to_bytes,
    records_from_bytes,
)

_log = logging.getLogger("flwr")

TAKEN = 3  # exit code of a site worker that has found another one
_START_SECONDS = 60.0  # for a new site worker to listen
_TURN_SECONDS = 600.0  # to wait while the site worker imports, or answers another message
_POLL_SECONDS = 0.05
_PACKAGE = Path(__file__).parents[2]

Process = subprocess.Popen[bytes]
_started: list[Process] = []  # kept: they go on after this process


class WorkerLostError(RuntimeError):
    """The site worker ended while it had a message; its releases may be on the ledger."""


def _log_file(folder: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    return os.open(folder / "worker.log", flags, mode=0o600)


def _start(folder: Path, node: Mapping[str, object], idle: float) -> Process:
    """Start a site worker that goes on after this process."""
    paths = [str(_PACKAGE), os.environ.get("PYTHONPATH", "")]
    log = _log_file(folder)
    process = subprocess.Popen(
        # -P: no module of the working directory is imported
        [sys.executable, "-P", "-m", "lalora_app.site_worker.process"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,  # Ctrl-C is for the SuperNode
    )
    os.close(log)
    settings = {"folder": str(folder), "node": dict(node), "idle": idle}
    # It has ended if the pipe is broken: its exit code tells.
    with suppress(BrokenPipeError), cast("IO[bytes]", process.stdin) as pipe:
        pipe.write(json.dumps(settings).encode())
    _started.append(process)
    return process


def _connected(path: Path) -> Connection | None:
    """Return a connection to this user's site worker; None: none listens.

    Raises:
        UnusableError: if the socket or the process behind it is not this user's.
    """
    if not handshake.require_own_socket(path):
        return None
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.connect(str(path))
        handshake.require_own_peer(connected)
    except (ConnectionRefusedError, FileNotFoundError):
        connected.close()
        return None
    except BaseException:
        connected.close()
        raise
    return handshake.as_connection(connected)


def _is_ready(connection: Connection, identity: bytes) -> bool:
    """Wait for this message's turn; False: the site worker ended before.

    Raises:
        UnusableError: if it has another identity, or is busy for too long.
    """
    try:
        connection.send_bytes(identity)
        if not connection.poll(_TURN_SECONDS):
            raise UnusableError(f"it was busy for {_TURN_SECONDS:g} s")
        said = connection.recv_bytes(len(handshake.OTHER))
    except (EOFError, OSError):
        return False
    if said != handshake.READY:
        raise UnusableError("it runs with other code, libraries, node config or environment")
    return True


def _ready_connection(path: Path, identity: bytes) -> Connection | None:
    """Return a connection on which it is this message's turn; None: no site worker listens."""
    connection = _connected(path)
    if connection is None:
        return None
    try:
        if _is_ready(connection, identity):
            return connection
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None


def connect(node: Mapping[str, object], idle: float) -> Connection:
    """Return a connection to the site worker, started if none listens, which waits for a message.

    Args:
        node: the node config.
        idle: seconds without a message after which a new site worker ends.

    Raises:
        UnusableError: if the site worker cannot be used; nothing has been handed over then.
    """
    folder = handshake.private_folder(state_folder(node))
    path, identity = handshake.socket_path(folder), handshake.identity(node)
    started: Process | None = None
    deadline = time.monotonic() + _START_SECONDS
    while (connection := _ready_connection(path, identity)) is None:
        ended = None if started is None else started.poll()
        if started is None or ended == TAKEN:
            started = _start(folder, node, idle)
        elif ended is not None:
            raise UnusableError(f"it ended with exit code {ended}; see {folder / 'worker.log'}")
        if time.monotonic() > deadline:
            raise UnusableError(f"it did not listen within {_START_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return connection


def _log_again(line: bytes) -> None:
    level, text = json.loads(line)
    _log.log(level, "%s", text)


def exchange(connection: Connection, name: str, message: Message, context: Context) -> RecordDict:
    """Send a message and return the content of its reply; the context gets its new state.

    Args:
        connection: a connection from :func:`connect`.
        name: the kind of the message, one of `process.py`.
        message: the message.
        context: its context.

    Raises:
        WorkerLostError: if the site worker ends before the reply is whole.
    """
    parts = name.encode(), message_to_bytes(message), context_to_bytes(context)
    try:
        for part in parts:
            connection.send_bytes(part)
        while (said := connection.recv_bytes())[:1] == handshake.LOG:
            _log_again(said[1:])
        state = connection.recv_bytes()
    except (EOFError, OSError) as error:
        raise WorkerLostError(
            "the site worker ended while it had the message, whose releases may be on the ledger"
        ) from error
    finally:
        connection.close()
    context.state = records_from_bytes(state)
    return records_from_bytes(said[1:])


def by_site_worker(name: str, own: Handler) -> Handler:
    """Return a handler that hands its messages over, if the node config has ``worker=true``.

    Args:
        name: the kind of the messages.
        own: the handler that answers in this process if there is no usable site worker.
    """

    def handle(message: Message, context: Context) -> RecordDict:
        idle = handshake.idle_seconds(context.node_config)
        if idle is None:
            return own(message, context)
        try:
            connection = connect(context.node_config, idle)
        except (UnusableError, OSError) as reason:
            _log.warning("LaLoRA client: the site worker is not used: %s", reason)
            return own(message, context)
        return exchange(connection, name, message, context)

    return handle
