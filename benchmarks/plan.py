"""Compare what `lalora plan` says with a run: seconds, noise multiplier and bytes.

python benchmarks/plan.py                          # the default run with four rounds
python benchmarks/plan.py --rounds 10 -c 'train.batch-size=128'

It times a trial, runs the same config with `lalora run`, reads its history and the ledgers of its
clients, and prints one JSON object. Durations leave out the start of the run and its first round,
in which models are built and noise is calibrated: the later rounds are scaled to all rounds. Run it
on a machine with nothing else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lalora_app.cli.plan_inputs import simulated_sizes
from lalora_app.methods.head_rounds import class_sum_releases
from lalora_app.privacy.ledger import Ledger
from lalora_app.privacy.planning import Choice, Given, choice
from lalora_app.settings.run_config import clients_per_round
from lalora_app.simulation.launch import Launch, read_launch
from lalora_app.simulation.traffic import Traffic
from lalora_app.simulation.trial import trial

APP = Path(__file__).resolve().parents[1]


def planned(launch: Launch) -> tuple[Choice, Traffic]:
    """Return the plan of a config as it is, with a trial's speed."""
    config, (speed, traffic) = launch.config, trial(launch)
    sizes = simulated_sizes(config, launch.nodes)
    given = Given(
        examples=min(sizes),
        clients=launch.nodes,
        per_round=clients_per_round(config.fraction_train, launch.nodes),
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        speed=speed,
        past=tuple(class_sum_releases(config)),
        rounds_before=int(config.sums_classes(1)),
    )
    train, rounds = config.train, config.num_server_rounds - given.rounds_before
    return choice(given, train.batch_size, train.local_steps, rounds), traffic


def run(overrides: list[str], nodes: int, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Run the config; return its history, and the largest noise multiplier of the ledgers."""
    own = [f'output="{folder / "out"}"']
    options = [word for text in (*overrides, *own) for word in ("-c", text)]
    command = [sys.executable, "-m", "lalora_app.cli.main", "run", str(APP), *options]
    env = os.environ | {"LALORA_HOME": str(folder / "home")}
    done = subprocess.run(
        [*command, "--nodes", str(nodes)], env=env, capture_output=True, text=True, cwd=APP
    )
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    (history,) = folder.glob("out/*/history.jsonl")
    entries = Ledger(folder / "home" / "ledger.sqlite").entries()
    rows = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
    steps = [e.release for e in entries if e.release.sampling_rate < 1]  # not the class sums
    return rows, max(release.noise_multiplier for release in steps)


def main() -> None:
    """Plan, run, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("-c", "--run-config", action="append", default=[])
    args = parser.parse_args()
    overrides = [*args.run_config, f"num-server-rounds={args.rounds}"]
    plan, traffic = planned(read_launch(APP, overrides, args.nodes))
    with tempfile.TemporaryDirectory() as folder:
        rows, noise = run(overrides, args.nodes, Path(folder))
    up, down = traffic.per_round(args.rounds)
    later = (rows[-1]["elapsed"] - rows[0]["elapsed"]) / (len(rows) - 1)
    found = {
        "seconds": {"plan": plan.seconds, "run": later * len(rows), "whole": rows[-1]["elapsed"]},
        "noise_multiplier": {"plan": plan.noise_multiplier, "ledger": noise},
        "upload_bytes": {"plan": up, "run": sum(r["upload_bytes"] for r in rows) / len(rows)},
        "download_bytes": {"plan": down, "run": sum(r["download_bytes"] for r in rows) / len(rows)},
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
