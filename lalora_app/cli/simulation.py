"""``flwr run`` in simulation as it should be: neutral folder, own SuperLink, true exit code.

``flwr run`` returns 0 for failed runs, leaves a SuperLink behind whose first working directory
shadows the app's code, and installs the app's dependencies anew for every run. This module sets
what has to be set, asks for the run's real status, and stops the SuperLink that it started.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from lalora_app.methods.compatibility import method_of
from lalora_app.results.run_folder import as_toml
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.overrides import merged
from lalora_app.settings.run_config import Scalar, flatten, from_tables, parse

_FLWR = str(Path(sys.executable).parent / "flwr")
_GRACE = 10.0  # seconds to end by itself
_FINISHED = "finished:"
_REASON = "LaLoRA: "  # before the ServerApp's last word on a run that failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_DEDUP_LOGS": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def app_defaults(app: Path) -> dict[str, Any]:
    """Return the app's own run config, flat.

    Raises:
        ConfigError: if the folder is no app.
    """
    project = app / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(f"app={app} must be a folder with the app's pyproject.toml")
    return from_tables(tomllib.loads(project.read_text("utf-8"))["tool"]["flwr"]["app"]["config"])


def _checked(app: Path, overrides: Iterable[str]) -> dict[str, Scalar]:
    """Parse the run config here, so that a bad key costs a line and not a started simulation.

    Returns:
        The keys that are overridden, with the values that were checked.
    """
    own = merged(overrides)
    config = parse(app_defaults(app) | own)
    method_of(config)
    return {key: value for key, value in flatten(config).items() if key in own}


def _flwr(arguments: Sequence[str], env: dict[str, str], cwd: Path) -> str:
    """Run a flwr command that prints JSON and return its output."""
    done = subprocess.run(
        [_FLWR, *arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ConfigError("flwr: " + (done.stdout + done.stderr).strip())
    return done.stdout


def _run_id(answer: str) -> str:
    reply = json.loads(answer[answer.index("{") :])
    if not reply.get("success"):
        lines = [line for line in str(reply.get("error-message")).splitlines() if line.strip()]
        raise ConfigError(f"flwr run: {lines[-1]}")
    return str(reply["run-id"])


def _status(run_id: str, env: dict[str, str], cwd: Path) -> tuple[str, str]:
    answer = _flwr(["list", "--run-id", run_id, "--format", "json"], env, cwd)
    entry = json.loads(answer[answer.index("{") :])["runs"][0]
    return str(entry["status"]), str(entry.get("details", ""))


def _started_here(home: Path) -> list[psutil.Process]:
    """Return the processes that this launch left behind: those with its FLWR_HOME."""
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("FLWR_HOME") == str(home)
    ]


def _stop(home: Path) -> None:
    """End what this launch started, politely at first, and wait until it is gone."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        processes = _started_here(home)
        for process in processes:
            _send(end, process)
        psutil.wait_procs(processes, timeout=_GRACE)


def _send(end: Callable[[psutil.Process], None], process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        end(process)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, and Ctrl-C also where the shell had ignored it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {end: signal.signal(end, interrupt) for end in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def _show(lines: Iterable[str]) -> str:
    """Print a run's log as it comes; return why the app says that the run failed, if it does."""
    reason = ""
    for line in lines:
        print(line, end="", flush=True)
        reason = line.partition(_REASON)[2].strip() or reason
    return reason


def _follow(run_id: str, env: dict[str, str], cwd: Path) -> tuple[str, str]:
    """Show the run's log until it ends; return its status and why it failed."""
    command, live = [_FLWR, "log", run_id, "--stream"], env | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=live, cwd=cwd, stdout=subprocess.PIPE, text=True) as log:
        reason = _show(log.stdout or ())
    status, details = _status(run_id, env, cwd)
    while not status.startswith(_FINISHED):
        time.sleep(1)
        status, details = _status(run_id, env, cwd)
    return status.removeprefix(_FINISHED), reason or details


def _gpus() -> int:
    """Count the GPUs by their driver's own tool: torch takes seconds to import."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ")


def resources(nodes: int, gpus: int, clients_per_gpu: int) -> str:
    """Return the simulation's federation config: a core a client, and its share of a GPU.

    Ray hides every GPU from a client that has no share of one.
    """
    share = f" client-resources-num-gpus={1 / clients_per_gpu:.4g}" if gpus else ""
    return f"num-supernodes={nodes} client-resources-num-cpus=1{share}"


def launch(app: Path, overrides: Sequence[str], *, nodes: int, clients_per_gpu: int = 4) -> int:
    """Run the app in simulation and return 0 only if the run completed.

    Args:
        app: folder with the app's pyproject.toml.
        overrides: as of ``flwr run -c``: key=value pairs and TOML files; a later one wins.
        nodes: simulated clients.
        clients_per_gpu: clients that train on one GPU at the same time, where there is one.

    Raises:
        ConfigError: for a bad config, before anything is started.
    """
    values = _checked(app, overrides)
    home = Path(tempfile.mkdtemp(prefix="lalora-"))
    env = _environment(home)
    # One file: Flower drops pairs with spaces around "=", and takes no pairs beside a file.
    config = home / "overrides.toml"
    config.write_text(as_toml(values), "utf-8")
    federation = resources(nodes, _gpus(), clients_per_gpu)
    arguments = ["run", str(app.resolve()), "--format", "json", "--federation-config", federation]
    arguments += ["-c", str(config)]
    try:
        with _interruptible():
            answer = _flwr(arguments, env, home)
            status, details = _follow(_run_id(answer), env, home)
    finally:
        _stop(home)
        shutil.rmtree(home, ignore_errors=True)
    if status != "completed":
        print(f"lalora: the run {status}: {details}", file=sys.stderr)
        return 1
    return 0
