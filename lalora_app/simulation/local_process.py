"""The process of a run in worker processes: it checks the run and then is its server."""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import parse
from lalora_app.simulation.launch import Launch
from lalora_app.simulation.launch_checks import check_here

if TYPE_CHECKING:
    from lalora_app.workers.worker import Place

COMPLETED, FAILED, BAD_INPUT = 0, 1, 2  # exit codes
_log = logging.getLogger("flwr")


def to_json(launch: Launch) -> str:
    """Return a launch as one line for :func:`main`."""
    return json.dumps(
        {
            "app": str(launch.app),
            "defaults": launch.defaults,
            "values": launch.values,
            "nodes": launch.nodes,
            "clients_per_gpu": launch.clients_per_gpu,
            "workers": launch.workers,
        }
    )


def from_json(line: str) -> Launch:
    """Return the launch of :func:`to_json`."""
    fields: dict[str, Any] = json.loads(line)
    config = parse(fields["defaults"] | fields["values"])
    return Launch(**(fields | {"config": config, "app": Path(fields["app"])}))


def _end_with_launcher() -> None:
    """Wait until the launcher's end of standard input is closed; kill this group of processes."""
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _places(launch: Launch) -> "list[Place]":
    """Return where the worker processes compute, and log it.

    Raises:
        ConfigError: for more workers than cores, or than shares of GPUs.
    """
    from lalora_app.workers.places import all_cores, places, visible_gpus

    cores, gpus = all_cores(), visible_gpus(launch.config.model.device)
    found = places(
        launch.nodes,
        cores=cores,
        gpus=gpus,
        workers=launch.workers,
        clients_per_gpu=launch.clients_per_gpu,
    )
    where = f"{len(gpus)} GPUs" if gpus else f"{cores} cores"
    _log.info("LaLoRA %d clients in %d processes on %s", launch.nodes, len(found), where)
    return found


def _run(launch: Launch, where: "list[Place]") -> None:
    """Run the ServerApp with its clients in worker processes."""
    from lalora_app import server_app
    from lalora_app.workers.local_grid import LocalGrid
    from lalora_app.workers.worker_pool import WorkerPool

    run_config = launch.defaults | launch.values
    with WorkerPool(where, run_config) as pool:
        server_app.serve(LocalGrid(pool, launch.nodes), run_config, settle=0.0)


def main() -> int:
    """Read a launch from standard input, check it, run it, and return the exit code.

    All lines of the run go to standard output and standard error. A bad config ends with the exit
    code 2 before any client is asked.
    """
    launch = from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    from lalora_app.workers.worker_pool import prepare_start

    try:
        prepare_start()
        where = _places(launch)
        check_here(launch)
    except ConfigError as error:
        _log.error("LaLoRA: %s", error)
        return BAD_INPUT
    try:
        _run(launch, where)
    except Exception:
        traceback.print_exc()  # the server has logged the reason in one line
        return FAILED
    return COMPLETED
