"""Measure the overhead of the simulation: wall time of a round and training time of clients.

python benchmarks/overhead.py                       # 4, 20 and 100 clients, the default model
python benchmarks/overhead.py --clients 4,20 --rounds 8

Clients write their times to their own log (LALORA_TIMING) and never send them. It writes
benchmarks/results/overhead.json and prints medians over all rounds except the first, which builds
the models:

round     wall time from the first request to the aggregate
slowest   training time of the slowest client: the shortest possible round with unlimited cores
training  sum of all clients' training times, divided by the number of cores: the shortest possible
          round on this machine
ledger    time of noise calibration and ledger writes, divided by the number of cores
rest      round - training - ledger: Ray, messages, loading and aggregating the adapter
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

APP = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).parent / "results" / "overhead.json"
TIMING = re.compile(r"LaLoRA timing (\d+) (\S+) ([\d.]+) ([\d.]+)")
SMALL = "data.dirichlet-alpha=inf train.batch-size=16 train.local-steps=2"


def run(clients: int, rounds: int, folder: str) -> tuple[list[dict], str]:
    """Run the app in simulation; return its history and its whole log."""
    own = f'{SMALL} num-server-rounds={rounds} min-clients={clients} output="{folder}"'
    command = [
        sys.executable,
        "-m",
        "lalora_app.cli.main",
        "run",
        str(APP),
        "--verbose",
        "--nodes",
        str(clients),
    ]
    env = os.environ | {"LALORA_TIMING": "1"}
    done = subprocess.run([*command, "-c", own], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    (history,) = Path(folder).glob("*/history.jsonl")
    lines = history.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines], done.stdout + done.stderr


def client_times(log: str) -> dict[int, dict[str, tuple[float, float]]]:
    """Return attempt -> client -> (seconds for the ledger, seconds for training)."""
    times: dict[int, dict[str, tuple[float, float]]] = defaultdict(dict)
    for attempt, client, ledger, training in TIMING.findall(log):
        times[int(attempt)][client] = (float(ledger), float(training))
    return times


def measure(clients: int, rounds: int) -> dict[str, float]:
    """Return the medians over all rounds except the first."""
    cores = min(os.cpu_count() or 1, clients)
    with tempfile.TemporaryDirectory() as folder:
        history, log = run(clients, rounds, folder)
    times = client_times(log)
    rows = []
    for entry in history[1:]:
        own = list(times[entry["attempt"]].values())
        if len(own) != clients:
            raise SystemExit(f"round {entry['attempt']}: {len(own)} of {clients} clients' times")
        ledger, training = (sum(t[i] for t in own) / cores for i in (0, 1))
        whole, slowest = entry["seconds"], max(t[1] for t in own)
        rows.append((whole, slowest, training, ledger, whole - training - ledger))
    names = ("round", "slowest", "training", "ledger", "rest")
    found = {n: statistics.median(row[i] for row in rows) for i, n in enumerate(names)}
    shares = {
        "share_beyond_slowest": statistics.median(1 - row[1] / row[0] for row in rows),
        "share_beyond_training": statistics.median(1 - row[2] / row[0] for row in rows),
    }
    return {"clients": clients, "cores": cores, "rounds": rounds - 1, **found, **shares}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clients", type=lambda t: [int(n) for n in t.split(",")], default=[4, 20, 100]
    )
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    found = []
    for clients in args.clients:
        found.append(measure(clients, args.rounds))
        print("  ".join(f"{k} {v:.3g}" for k, v in found[-1].items()), flush=True)
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
