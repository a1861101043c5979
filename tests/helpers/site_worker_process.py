"""A site worker that dies or waits at one moment of a message.

python site_worker_process.py MOMENT MARK

It creates the file MARK when the moment has come. At "wait ..." it then waits to be killed, or for
the file MARK to vanish; at any other moment it kills itself with SIGKILL.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# With the lines on the ledger when the process dies there, and after the message came once more.
MOMENTS = {
    "received": (0, 1),
    "reserved": (1, 2),
    "drawn": (1, 2),
    "trained": (1, 2),
    "saved": (1, 1),  # the second time the saved reply is sent
    "answered": (1, 1),
}


def _act(moment: str, mark: Path) -> None:
    mark.touch()
    if not moment.startswith("wait "):
        os.kill(os.getpid(), signal.SIGKILL)
    while mark.exists():
        time.sleep(0.01)


def _with(act: Callable[[], None], inner: Callable[..., Any], *, before: bool) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            act()
        result = inner(*args, **kwargs)
        if not before:
            act()
        return result

    return wrapped


def patch(asked: str, mark: Path) -> None:
    """Let this process die or wait at a moment of a train message."""
    from lalora_app.client import answers, received_round, requests
    from lalora_app.private_step import step
    from lalora_app.site_worker import process

    moment = asked.removeprefix("wait ")
    owner, name, before = {
        "received": (answers, "read_request", True),
        "reserved": (requests, "reserve", False),
        "drawn": (step, "add_noise", False),
        "trained": (requests, "run_local_steps", False),
        "saved": (received_round.Round, "save_files", False),
        "answered": (process, "records_to_bytes", True),
    }[moment]
    moments = iter([moment])  # it comes once

    def act() -> None:
        if next(moments, None):
            _act(asked, mark)

    setattr(owner, name, _with(act, getattr(owner, name), before=before))


def main() -> int:
    from lalora_app.site_worker import process

    patch(sys.argv[1], Path(sys.argv[2]))
    return process.main()


if __name__ == "__main__":
    sys.exit(main())
