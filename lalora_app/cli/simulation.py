"""Run the app in Flower's simulation: own SuperLink, neutral folder, honest exit code.

``flwr run`` returns 0 for failed runs. It also leaves a SuperLink running, in whose first working
directory Python finds the app's code before the installed one, and it installs the app's
dependencies for every run. This module sets Flower's environment, asks for the run's real status,
and stops the processes that it started.
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from lalora_app.cli.flower_commands import COMPLETED, follow, start_run
from lalora_app.cli.launch_checks import (
    Launch,
    check_launch,
    go_offline_without_hub,
    needs_hub,
    resumed_config,
)
from lalora_app.cli.run_display import RunDisplay, standard_display
from lalora_app.results.run_folder import as_toml
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE
from lalora_app.settings.overrides import merged, read_toml
from lalora_app.settings.run_config import Scalar, flatten, from_tables, parse

_NODES = 4
_GRACE = 10.0  # seconds for a process to end by itself
_CONFIG_TABLE = ("tool", "flwr", "app", "config")


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
        "PYTHONIOENCODING": "utf-8",
        "RAY_DEDUP_LOGS": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def app_defaults(app: Path) -> dict[str, Any]:
    """Return the flat run config of an app's pyproject.toml.

    Raises:
        ConfigError: if the folder holds no Flower app with a run config.
    """
    project = app / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(f"app={app} must be a folder with the app's pyproject.toml")
    table: Any = read_toml(project, f"app={app}: {project}")
    for name in _CONFIG_TABLE:
        table = table.get(name) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        raise ConfigError(f"app={app} must have a [{'.'.join(_CONFIG_TABLE)}] table in {project}")
    return from_tables(table)


def read_launch(
    app: Path, overrides: Iterable[str], nodes: int | None
) -> tuple[Launch, dict[str, Scalar]]:
    """Return what is to be started, and the values of the keys that are not the app's own.

    Args:
        app: folder of the app.
        overrides: ``-c`` options of the command; with ``resume-from``, all other keys are taken
            from the run's own config.
        nodes: number of simulated clients; None: as many as the resumed run has, or 4.

    Raises:
        ConfigError: for a bad key or value.
    """
    own, clients = merged(overrides), None
    defaults = app_defaults(app)
    if own.get("resume-from", NONE) != NONE:
        saved, clients = resumed_config(own)
        own = saved | own
        if nodes and clients and nodes != clients:
            raise ConfigError(f"--nodes {nodes} must be {clients}, as in resume-from")
    config = parse(defaults | own)
    values = {key: value for key, value in flatten(config).items() if key in own}
    return Launch(config, defaults, nodes or clients or _NODES), values


def _started_here(home: Path) -> set[psutil.Process]:
    """Return the running processes that this launch started.

    They are found by their FLWR_HOME; their children too, as Ray's agents overwrite their own
    environment.
    """
    found = {
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("FLWR_HOME") == str(home)
    }
    return found.union(*map(_children, found))


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def _stop(home: Path) -> None:
    """Terminate the processes of this launch, kill those that remain, and wait for their end."""
    processes: set[psutil.Process] = set()
    for end in (psutil.Process.terminate, psutil.Process.kill):
        processes |= _started_here(home)  # those found before may have lost their parent
        for process in processes:
            _send(end, process)
        psutil.wait_procs(processes, timeout=_GRACE)


def _send(end: Callable[[psutil.Process], None], process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        end(process)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for SIGINT and SIGTERM, even if they were ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {end: signal.signal(end, interrupt) for end in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def _gpus() -> int:
    """Return the number of GPUs by nvidia-smi, as torch takes seconds to import."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ")


def resources(nodes: int, gpus: int, clients_per_gpu: int) -> str:
    """Return Flower's federation config: one core per client, and its share of a GPU.

    Without a share, Ray hides all GPUs from a client.
    """
    share = f" client-resources-num-gpus={1 / clients_per_gpu:.4g}" if gpus else ""
    return f"num-supernodes={nodes} client-resources-num-cpus=1{share}"


def launch(
    app: Path,
    overrides: Sequence[str],
    *,
    nodes: int | None = None,
    clients_per_gpu: int = 4,
    verbose: bool = False,
) -> int:
    """Run the app in simulation and return 0 only if the run completed.

    Args:
        app: folder with the app's pyproject.toml.
        overrides: ``-c`` options of ``flwr run``: key=value pairs and TOML files; the last wins.
        nodes: number of simulated clients; None: as many as the resumed run has, or 4.
        clients_per_gpu: number of clients that train on one GPU at the same time.
        verbose: whether the lines of Flower and Ray are printed as well.

    Raises:
        ConfigError: for a run that cannot succeed, before anything is started.
        LayoutError: for a model that gives no per-example gradients, likewise.
        FlowerError: if Flower cannot start the run, or does not tell its end.
    """
    launched, values = read_launch(app, overrides, nodes)
    display = standard_display(verbose=verbose)
    with _interruptible():
        _check(launched, display)
    home = Path(tempfile.mkdtemp(prefix="lalora-"))
    # One file: Flower drops pairs with spaces around "=", and takes no pairs beside a file.
    config = home / "overrides.toml"
    config.write_text(as_toml(values), "utf-8")
    arguments = [str(app.resolve()), "-c", str(config)]
    arguments += ["--federation-config", resources(launched.nodes, _gpus(), clients_per_gpu)]
    try:
        with _interruptible(), display:
            clients = launched.nodes
            display.print(f"starting Flower's simulation with {clients} clients, 10 to 20 seconds")
            env = _environment(home)
            run_id = start_run(arguments, env, home)
            status, details = follow(run_id, env, home, display.show)
    except KeyboardInterrupt:
        display.print_all(_how_to_go_on(app, launched, display.folder))
        raise
    finally:
        _stop(home)
        shutil.rmtree(home, ignore_errors=True)
    if status == COMPLETED:
        return 0
    code = _failed(status, details, display)
    display.print_all(_how_to_go_on(app, launched, display.folder))
    return code


def _check(launch: Launch, display: RunDisplay) -> None:
    """Check a run, and say so: the checks take seconds."""
    display.print("checking data, model and privacy budget")
    if needs_hub(launch) and go_offline_without_hub():
        display.print("warning: the model hub does not answer: only its local cache is used")
    check_launch(launch)


def _how_to_go_on(app: Path, launch: Launch, folder: str) -> list[str]:
    """Return the lines that tell how an unfinished run goes on, if it can."""
    if launch.config.compare != NONE:
        return ["the same command continues the comparison; finished runs are kept"]
    if not folder or not list(Path(folder).glob("checkpoints/*.safetensors")):
        return []
    resume = shlex.quote(f'resume-from="{folder}"')
    return [f"to continue the run: lalora run {shlex.quote(str(app))} -c {resume}"]


def _failed(status: str, details: str, display: RunDisplay) -> int:
    """Print the reason of a failed run in one line, after Flower's lines if the app gave none."""
    if not display.reason:
        print("\n".join(display.other_lines()), file=sys.stderr)
    reason = display.reason or details or "Flower gives no reason; try --verbose"
    print(f"lalora: the run {status}: {reason}", file=sys.stderr)
    return 1
