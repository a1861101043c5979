"""Start `lalora run`, and read its results: the command that users start, in processes of its own.

Clients write the seconds of their training to their own log (LALORA_TIMING) and never send them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalora_app.results.run_folder import as_toml
from lalora_app.settings.run_config import Scalar

APP = Path(__file__).resolve().parents[2]
CLIENTS_PER_GPU = 8
_TIMING = re.compile(r"LaLoRA timing (\d+) (\S+) ([\d.]+) ([\d.]+)")
_PROCESSES = re.compile(r"LaLoRA \d+ clients in (\d+) processes")


def client_times(log: str) -> dict[int, dict[str, tuple[float, float]]]:
    """Return attempt -> client -> (seconds for the ledger, seconds for training)."""
    times: dict[int, dict[str, tuple[float, float]]] = defaultdict(dict)
    for attempt, client, ledger, training in _TIMING.findall(log):
        times[int(attempt)][client] = (float(ledger), float(training))
    return times


@dataclass(frozen=True)
class AppRun:
    """A finished run.

    Attributes:
        history: one entry per attempt, as in history.jsonl.
        summary: the content of summary.json.
        log: what the command printed.
    """

    history: list[dict[str, Any]]
    summary: dict[str, Any]
    log: str

    @property
    def processes(self) -> int:
        """Return the number of worker processes."""
        found = _PROCESSES.search(self.log)
        if found is None:
            raise ValueError("the log of the run does not tell its worker processes")
        return int(found[1])

    def training_seconds(self, attempt: int) -> list[float]:
        """Return the seconds of training of each client in one attempt."""
        return [training for _, training in client_times(self.log)[attempt].values()]


def run(values: Mapping[str, Scalar], nodes: int) -> AppRun:
    """Run the app in worker processes; ledgers and results are in a folder that is deleted.

    Args:
        values: the keys of the run config that are not the app's defaults.
        nodes: the number of clients.

    Raises:
        RuntimeError: if the run fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="lalora-gpu-") as folder:
        file, output = Path(folder, "run.toml"), Path(folder, "results")
        own = {"output": str(output), "min-clients": nodes, "min-replies": nodes}
        file.write_text(as_toml(dict(values) | own), "utf-8")
        command = [sys.executable, "-m", "lalora_app.cli.main", "run", str(APP), "--verbose"]
        command += ["--engine", "local", "--nodes", str(nodes), "-c", str(file)]
        command += ["--clients-per-gpu", str(CLIENTS_PER_GPU)]
        env = os.environ | {"LALORA_TIMING": "1", "LALORA_HOME": str(Path(folder, "home"))}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"lalora run ended with {done.returncode}: {log[-3000:]}")
        (found,) = output.iterdir()
        lines = (found / "history.jsonl").read_text("utf-8").splitlines()
        summary = json.loads((found / "summary.json").read_text("utf-8"))
        return AppRun(list(map(json.loads, lines)), summary, log)
