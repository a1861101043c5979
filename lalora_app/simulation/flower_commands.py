"""Start a run by the ``flwr`` command, follow its log, and ask for its status."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lalora_app.settings.errors import first_line

COMPLETED = "completed"
_FLWR = str(Path(sys.executable).parent / "flwr")
_FINISHED = "finished:"
_UNFINISHED = ("pending", "starting", "running")
_STATUS_SECONDS = 120.0  # from the end of the log until the status must be finished
_POLL_SECONDS = 1.0
_TRIES = 3  # to start a SuperLink, for which Flower waits 15 seconds
_BROKEN_LOG = (
    "WARNING : LaLoRA flwr log ended with exit code {}: the run goes on, its next lines are not "
    "shown\n"
)
_TOO_SLOW = "Failed to start local SuperLink within"


class FlowerError(Exception):
    """Flower could not start the run, or did not report its end; the text is one line."""


def _flwr(arguments: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
    """Run a flwr command that prints JSON and return its output.

    Raises:
        FlowerError: if the command fails.
    """
    done = subprocess.run(
        [_FLWR, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise FlowerError(f"flwr {arguments[0]}: {_last_line(done.stdout + done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _json(command: str, answer: str) -> dict[str, Any]:
    """Return the JSON object in a command's output, which other lines may precede."""
    try:
        return dict(json.loads(answer[answer.index("{") :]))
    except ValueError as error:
        raise FlowerError(f"flwr {command} must print JSON: {first_line(error)}") from error


def start_run(arguments: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
    """Start a run and return its id; try again if the SuperLink does not start in time.

    Raises:
        FlowerError: if Flower refuses the run.
    """
    for tries_left in reversed(range(_TRIES)):
        reply = _json("run", _flwr(["run", *arguments, "--format", "json"], env, cwd))
        message = str(reply.get("error-message"))
        if reply.get("success") or not (tries_left and _TOO_SLOW in message):
            break
    if not reply.get("success"):
        raise FlowerError(f"flwr run: {_last_line(message)}")
    return str(reply["run-id"])


def _status(run_id: str, env: Mapping[str, str], cwd: Path) -> tuple[str, str]:
    """Return the status of a run, such as ``finished:failed``, and Flower's details of it."""
    answer = _json("list", _flwr(["list", "--run-id", run_id, "--format", "json"], env, cwd))
    try:
        (run,) = answer["runs"]
        return str(run["status"]), str(run.get("status-details", ""))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FlowerError(f"flwr list must report run {run_id} with a status: {answer}") from error


def _final_status(
    run_id: str, env: Mapping[str, str], cwd: Path, seconds: float
) -> tuple[str, str]:
    """Wait until a run is finished; return its status and details.

    Args:
        run_id: id of the run.
        env: environment of the Flower command.
        cwd: working folder of the Flower command.
        seconds: longest time to wait; inf for a run whose log may have broken off.

    Raises:
        FlowerError: for an unknown status, or if the run is not finished in time.
    """
    deadline = time.monotonic() + seconds
    status, details = _status(run_id, env, cwd)
    while not status.startswith(_FINISHED):
        if status not in _UNFINISHED:
            known = ", ".join((*_UNFINISHED, f"{_FINISHED}*"))
            raise FlowerError(f"flwr list: status={status!r} must be one of {known}")
        if time.monotonic() >= deadline:
            raise FlowerError(
                f"the log of the run has ended, and {seconds:g} s later its status is "
                f"still {status!r}"
            )
        time.sleep(_POLL_SECONDS)
        status, details = _status(run_id, env, cwd)
    return status.removeprefix(_FINISHED), details


def follow(
    run_id: str, env: Mapping[str, str], cwd: Path, show: Callable[[str], None]
) -> tuple[str, str]:
    """Pass every line of a run's log to ``show``; return the final status and its details.

    If the log breaks off (``flwr log`` fails), the run goes on and is waited for without a log.

    Raises:
        FlowerError: if Flower does not report the end of the run.
    """
    with subprocess.Popen(
        [_FLWR, "log", run_id, "--stream"],
        env={**env, "PYTHONUNBUFFERED": "1"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as log:
        for line in log.stdout or ():
            show(line)
    if log.returncode != 0:
        show(_BROKEN_LOG.format(log.returncode))
    seconds = _STATUS_SECONDS if log.returncode == 0 else math.inf
    return _final_status(run_id, env, cwd, seconds)
