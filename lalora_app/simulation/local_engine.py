"""Start the process of a run in worker processes, and show its lines."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from lalora_app.settings.errors import ConfigError
from lalora_app.simulation.launch import Launch
from lalora_app.simulation.local_process import BAD_INPUT, to_json
from lalora_app.simulation.run_display import RunDisplay

_CODE = "from lalora_app.simulation.local_process import main; raise SystemExit(main())"
_PACKAGE = "lalora_app"


def _environment(app: Path) -> dict[str, str]:
    """Return the environment of the process: the code is the app's own, as in Flower."""
    own = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
    }
    if (app / _PACKAGE).is_dir():
        before = os.environ.get("PYTHONPATH", "")
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(app.resolve()), before)))
    return os.environ | own


def _start(launch: Launch) -> subprocess.Popen[str]:
    """Start the process in a group of its own: Ctrl-C is for the launcher, which ends the group."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CODE],  # -P: nothing of the current folder is imported
        env=_environment(launch.app),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for the process, then kill what is left of its group, so that its log ends."""
    process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_in_workers(launch: Launch, display: RunDisplay) -> tuple[bool, str]:
    """Run the app with its clients in worker processes; return whether it completed, or why not.

    Raises:
        ConfigError: for a run that cannot succeed, before any client is asked.
    """
    process = _start(launch)
    assert process.stdin is not None
    assert process.stdout is not None
    ending = threading.Thread(target=_end, args=(process,))
    ending.start()
    try:
        process.stdin.write(to_json(launch) + "\n")
        process.stdin.flush()  # it stays open: its end tells that the launcher has died
        for line in process.stdout:
            display.show(line)
    finally:
        process.kill()
        ending.join()
        process.stdin.close()
        process.stdout.close()
    if process.returncode == BAD_INPUT and display.reason:
        raise ConfigError(display.reason)
    return process.returncode == 0, _reason(process.returncode)


def _reason(code: int) -> str:
    if code < 0:
        return f"its process was ended by signal {-code}, perhaps for want of memory"
    return ""
