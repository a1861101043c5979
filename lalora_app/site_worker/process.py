"""The site worker: it answers one message after another, and ends when it is idle for long.

python -m lalora_app.site_worker.process < SETTINGS

It holds a lock in the state folder as long as it lives, so that a site has one. The lock and the
ledger's transactions end with the process, also by ``kill -9``.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from lalora_app.client import answers
from lalora_app.client.answers import Handler
from lalora_app.site_worker import handshake
from lalora_app.site_worker.hand_over import TAKEN
from lalora_app.wire import messages
from lalora_app.wire.flower_bytes import (
    context_from_bytes,
    message_from_bytes,
    records_to_bytes,
)

_WAITING = 16  # messages that may wait for their turn
_CALLER_SECONDS = 60.0  # for a caller to say who it is, and to send its message
HANDLERS: Mapping[str, Handler] = {"query": answers.hello, "train": answers.train}


class _ToCaller(logging.Handler):
    """Send log lines to the process of the message, whose log is the site's; it may have died."""

    def __init__(self, connection: Connection):
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps([record.levelno, self.format(record)]).encode()
        with suppress(OSError):
            self._connection.send_bytes(handshake.LOG + line)


def _lock(folder: Path) -> int | None:
    """Return the lock of a site's only worker; None: another one has it."""
    import fcntl  # not on Windows, where there is no site worker

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(folder / "worker.lock", flags, mode=0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def listen(folder: Path) -> socket.socket:
    """Return a listening socket of this user only, in place of one that a dead process left.

    Raises:
        UnusableError: if the path is too long, or is no socket of this user.
    """
    path = handshake.socket_path(folder)
    if handshake.require_own_socket(path):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(_WAITING)
    return listener


def _received(connection: Connection, largest: int | None = None) -> bytes:
    """Receive one part; a caller that sends nothing is given up, so that the next one gets on."""
    if not connection.poll(_CALLER_SECONDS):
        raise TimeoutError
    return connection.recv_bytes(largest)


def _answer(connection: Connection) -> RecordDict:
    """Answer the message that a caller sends, and return the content of the reply."""
    name = _received(connection).decode()
    message = message_from_bytes(_received(connection))
    context = context_from_bytes(_received(connection))
    content = answers.content_or_refusal(message, context, HANDLERS[name])
    with suppress(OSError):  # the caller has died: the reply is lost, as with its process
        connection.send_bytes(handshake.CONTENT + records_to_bytes(content))
        connection.send_bytes(records_to_bytes(context.state))
    return content


def serve_caller(connection: Connection, identity: bytes) -> bool:
    """Answer one caller's message, if the caller has the same identity.

    Returns:
        Whether this process goes on. It ends for a caller with other code or settings, whose next
        message starts a new process; and after an unexpected error, which can leave a library or a
        GPU unusable.
    """
    log, to_caller = logging.getLogger("flwr"), _ToCaller(connection)
    log.addHandler(to_caller)
    try:
        if _received(connection, len(identity)) != identity:
            connection.send_bytes(handshake.OTHER)
            return False
        connection.send_bytes(handshake.READY)
        content = _answer(connection)
    except (EOFError, OSError):  # the caller died before its message was whole: nothing was done
        return True
    finally:
        log.removeHandler(to_caller)
        connection.close()
    return content.config_records.get(messages.CONFIG, ConfigRecord()).get("refusal") != "internal"


def _import_libraries() -> None:
    import opacus.accountants  # noqa: F401
    import peft  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    import lalora_app.client.requests  # noqa: F401


def _serve_accepted(accepted: socket.socket, identity: bytes) -> bool:
    """Answer an accepted caller, unless it is another user's; return whether to go on."""
    accepted.settimeout(None)
    try:
        handshake.require_own_peer(accepted)
    except handshake.UnusableError:
        accepted.close()
        return True
    return serve_caller(handshake.as_connection(accepted), identity)


def serve(listener: socket.socket, identity: bytes, idle: float) -> None:
    """Answer callers in turn until none has come for ``idle`` seconds."""
    listener.settimeout(idle)
    with suppress(TimeoutError):
        while _serve_accepted(listener.accept()[0], identity):
            pass


def main() -> int:
    """Serve the site whose settings are on the standard input; return the exit code."""
    settings: dict[str, Any] = json.load(sys.stdin)
    folder = handshake.private_folder(Path(settings["folder"]))
    if _lock(folder) is None:
        return TAKEN
    identity = handshake.identity(settings["node"])  # before the import of the code that it names
    listener = listen(folder)
    logging.getLogger("flwr").handlers.clear()  # lines go to the process of their message
    _import_libraries()
    serve(listener, identity, settings["idle"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
