"""Run the app in Flower's simulation: own SuperLink, neutral folder, honest status.

``flwr run`` returns 0 for failed runs. It also leaves a SuperLink running, in whose first working
directory Python finds the app's code before the installed one, and it installs the app's
dependencies for every run. This module sets Flower's environment, asks for the run's real status,
and stops the processes that it started.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from lalora_app.results.run_folder import as_toml
from lalora_app.simulation.flower_commands import COMPLETED, follow, start_run
from lalora_app.simulation.launch import Launch
from lalora_app.simulation.launch_checks import check_launch
from lalora_app.simulation.run_display import RunDisplay

_GRACE = 10.0  # seconds for a process to end by itself


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


def run_in_flower(launch: Launch, display: RunDisplay) -> tuple[bool, str]:
    """Run the app in Flower's simulation; return whether the run completed, or why not.

    Raises:
        ConfigError: for a run that cannot succeed, before Flower is started.
        LayoutError: for a model that gives no per-example gradients, likewise.
        FlowerError: if Flower cannot start the run, or does not tell its end.
    """
    check_launch(launch)
    home = Path(tempfile.mkdtemp(prefix="lalora-"))
    # One file: Flower drops pairs with spaces around "=", and takes no pairs beside a file.
    config = home / "overrides.toml"
    config.write_text(as_toml(launch.values), "utf-8")
    arguments = [str(launch.app.resolve()), "-c", str(config)]
    arguments += ["--federation-config", resources(launch.nodes, _gpus(), launch.clients_per_gpu)]
    try:
        display.print(f"starting Flower's simulation with {launch.nodes} clients, 10 to 20 seconds")
        env = _environment(home)
        status, details = follow(start_run(arguments, env, home), env, home, display.show)
    finally:
        _stop(home)
        shutil.rmtree(home, ignore_errors=True)
    return status == COMPLETED, details
