"""Measure what a simulated run costs besides its training, in worker processes and in Flower.

python benchmarks/engine.py --repeats 3 --output benchmarks/results/engine.json
python benchmarks/engine.py --comparison 20 --output benchmarks/results/engine_comparison.json
python benchmarks/engine.py --scale 1000 --output benchmarks/results/engine_scale.json

Runs of `lalora run` by both engines, interleaved. In each process a clock notes every call of the
ClientApp and every wave of messages that the server sends (`engine_clock/sitecustomize.py`).

start_s: from the command to the first message. round_s: from one wave of training to the next, with
the server's own work. training_s: the ClientApp's seconds in the busiest process of a wave.
rest_s: the wave without training_s, which is the engine's own cost. rss_mb: the largest sum of the
processes' memory, each shared page counted once. All but rss_mb are medians, over rounds without
the first one, then over repeats. Rows of the output file whose case is not measured stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
CLOCK = Path(__file__).parent / "engine_clock"
SHARED = ROOT.parent / "shared"
SST2_DATA = f"""
model.name="{SHARED}/models/minilm-l6-h384" model.max-length=64 data.name="{SHARED}/data/sst2"
data.test-split="validation" data.input-column="sentence"
"""
SST2 = f"{SST2_DATA} data.dirichlet-alpha=0.5 train.batch-size=32 train.micro-batch=16"
MANY = "train.batch-size=16 train.local-steps=2 data.dirichlet-alpha=inf"
FEW = "train.batch-size=8 train.local-steps=2 data.dirichlet-alpha=inf"  # examples per client
# name -> keys, clients, rounds
CASES = {
    "default": ("", 4, 6),
    "default, batch 16, two steps": (MANY, 4, 8),
    "default, batch 16, two steps, 32 clients": (MANY, 32, 8),
    "SST-2": (SST2, 4, 6),
}
Row = dict[str, Any]


class Memory(threading.Thread):
    """Samples the memory of all processes of a run until it is stopped."""

    def __init__(self, home: Path):
        super().__init__(daemon=True)
        self.home, self.most, self.stopped = str(home), 0.0, threading.Event()
        self.curve: list[tuple[float, float]] = []

    def run(self) -> None:
        """Sample every two seconds; the main function of the thread."""
        began = time.monotonic()
        while not self.stopped.wait(2.0):
            used = self._now()
            self.curve.append((round(time.monotonic() - began, 1), round(used, 1)))
            self.most = max(self.most, used)

    def _now(self) -> float:
        """Return MB, each shared page counted once."""
        used = 0
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("LALORA_HOME") == self.home:
                used += _pss(process)
        return used / 2**20


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended meanwhile
        return 0


def clocked(command: list[str], folder: Path) -> tuple[list[Row], float, float, Memory]:
    """Run a command; return the clock's rows, its start and end, and its memory.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    home, clock = folder / "home", folder / "clock.jsonl"
    own = {"LALORA_HOME": str(home), "ENGINE_CLOCK": str(clock)}
    own["PYTHONPATH"] = os.pathsep.join((str(CLOCK), str(ROOT)))
    memory = Memory(home)
    memory.start()
    start = time.time()
    subprocess.run(command, env=os.environ | own, check=True, stdout=subprocess.DEVNULL)
    end = time.time()
    memory.stopped.set()
    memory.join()
    return [json.loads(line) for line in clock.read_text("utf-8").splitlines()], start, end, memory


def busiest(rows: list[Row], start: float, end: float) -> float:
    """Return the ClientApp's seconds within a span of time, of the process that has most."""
    seconds: dict[int, float] = {}
    for row in rows:
        if row["what"] == "client" and start <= row["start"] and row["end"] <= end:
            seconds[row["pid"]] = seconds.get(row["pid"], 0.0) + row["end"] - row["start"]
    return max(seconds.values(), default=0.0)


def summary(rows: list[Row], start: float) -> Row:
    """Return the medians of one run's rounds, without the first round."""
    waves = [row for row in rows if row["what"] == "wave" and row["type"].startswith("train")]
    first = min(row["start"] for row in rows if row["what"] == "wave")
    trained = [busiest(rows, wave["start"], wave["end"]) for wave in waves]
    lasted = [wave["end"] - wave["start"] for wave in waves]
    between = [after["start"] - wave["start"] for wave, after in pairwise(waves)]
    return {
        "start_s": first - start,
        "round_s": median(between[1:]),
        "training_s": median(trained[1:]),
        "rest_s": median(all_ - own for all_, own in zip(lasted[1:], trained[1:], strict=True)),
    }


def one_run(engine: str, keys: str, clients: int, rounds: int, more: tuple[str, ...] = ()) -> Row:
    """Return the figures of one run."""
    with tempfile.TemporaryDirectory() as name:
        values = f'num-server-rounds={rounds} evaluate-every={rounds} output="{name}/out" {keys}'
        command = [sys.executable, "-m", "lalora_app.cli.main", "run", str(ROOT)]
        command += ["--engine", engine, "--nodes", str(clients), "-c", " ".join(values.split())]
        rows, start, _, memory = clocked([*command, *more], Path(name))
    return summary(rows, start) | {"rss_mb": memory.most, "memory": memory.curve}


def measured(names: list[str], engines: list[str], repeats: int) -> list[Row]:
    """Return a row for each case and engine, from interleaved runs."""
    found: dict[tuple[str, str], list[Row]] = {}
    for _ in range(repeats):
        for name in names:
            for engine in engines:
                run = one_run(engine, *CASES[name])
                run.pop("memory")
                found.setdefault((name, engine), []).append(run)
                print(name, engine, {k: round(v, 4) for k, v in run.items()}, flush=True)
    return [_row(name, engine, runs) for (name, engine), runs in found.items()]


def _row(name: str, engine: str, runs: list[Row]) -> Row:
    _, clients, rounds = CASES[name]
    figures = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
    return {"case": name, "engine": engine, "clients": clients, "rounds": rounds, **figures}


PLAN = """
output = "{folder}"
num-server-rounds = 8
evaluate-every = 8
[train]
batch-size = 16
local-steps = 2
[data]
dirichlet-alpha = inf
[compare]
nodes = 4
methods = ["la-lora", "dp-lora"]
epsilons = [3.0]
seeds = [{seeds}]
"""


def comparison(runs: int) -> Row:
    """Return the seconds of a comparison of runs with two steps of 16, and of their training."""
    with tempfile.TemporaryDirectory() as name:
        plan = Path(name) / "plan.toml"
        seeds = ", ".join(map(str, range(runs // 2)))
        plan.write_text(PLAN.format(folder=name, seeds=seeds), "utf-8")
        command = [sys.executable, "-m", "lalora_app.cli.main", "compare", str(plan)]
        rows, start, end, memory = clocked([*command, "--app", str(ROOT)], Path(name))
    waves = [row for row in rows if row["what"] == "wave"]
    training = sum(busiest(rows, wave["start"], wave["end"]) for wave in waves)
    sent = sum(wave["end"] - wave["start"] for wave in waves)
    first = min(wave["start"] for wave in waves)
    return {
        "runs": runs,
        "start_s": round(first - start, 2),
        "all_s": round(end - first, 2),  # without the start
        "training_s": round(training, 2),
        "engine_s": round(sent - training, 2),
        "server_s": round(end - first - sent, 2),  # evaluation, checkpoints, reports
        "rss_mb": round(memory.most, 1),
    }


def scale(clients: int) -> list[Row]:
    """Return rows of runs of SST-2 in which a twentieth and a tenth of the clients train.

    The memory is a list of pairs: seconds since the start, and MB of all processes.
    """
    rows = []
    for share in (0.05, 0.1):
        keys = f"{SST2_DATA} {FEW} fraction-train={share}"
        run = one_run("local", keys, clients, 20)
        figures = {key: round(run[key], 4) for key in run if key != "memory"}
        asked = round(share * clients)
        rows.append({"clients": clients, "asked": asked, **figures, "memory": run["memory"]})
    return rows


def _with_other_cases(new: list[Row], output: Path) -> list[Row]:
    """Return the new rows after those of the file whose case or engine was not measured now."""
    measured_now = {(row["case"], row["engine"]) for row in new}
    old = json.loads(output.read_text("utf-8")) if output.exists() else []
    return [row for row in old if (row["case"], row["engine"]) not in measured_now] + new


def main() -> None:
    """Measure what the options name, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--engines", nargs="+", default=["local", "flower"])
    parser.add_argument("--comparison", type=int, default=0, metavar="RUNS", help="an even number")
    parser.add_argument("--scale", type=int, default=0, metavar="CLIENTS")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    names = [name for name in args.cases if name != "SST-2" or SHARED.is_dir()]
    result: Mapping[str, Any] | list[Row]
    if args.comparison:
        result = comparison(args.comparison)
    elif args.scale:
        result = scale(args.scale)
    else:
        rows = measured(names, args.engines, args.repeats)
        result = _with_other_cases(rows, args.output)
    args.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
