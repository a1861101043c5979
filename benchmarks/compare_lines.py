"""Run the lines of a comparison side by side, where one run leaves most of the machine idle.

python benchmarks/compare_lines.py PLAN.toml --at-once 14
python benchmarks/compare_lines.py PLAN.toml OTHER.toml --at-once 14 --minutes 6
lalora compare PLAN.toml --table-only       # the table of the runs

Each line (a method or control at one epsilon) is a `lalora compare` of its own with one worker
process, and tunes its own rates, so lines do not wait for each other. At the end
~/lalora-results/NAME has links to the finished runs of all lines, so `lalora compare PLAN.toml`
shows them and runs what is missing; this script continues too. The plan must have `methods` and
`epsilons`; its `baselines` are not read. On a GPU the steps of a small model wait for the host, and
many processes share the card; start `nvidia-cuda-mps-control -d` first, or their kernels run in
turn.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Line:
    """One line of the comparison.

    Attributes:
        label: a method, or the label of a control.
        epsilon: privacy budget.
    """

    label: str
    epsilon: float

    def __str__(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in f"{self.label} {self.epsilon:g}")


def lines_of(plan: dict[str, Any]) -> list[Line]:
    """Return the lines of a plan file, the methods first."""
    compare = plan["compare"]
    usual = compare["epsilons"]
    lines = [Line(method, e) for method in compare["methods"] for e in usual]
    for control in compare.get("controls", []):
        label = control.get("label", control["method"])
        lines += [Line(label, e) for e in control.get("epsilons", usual)]
    return lines


class Comparison:
    """The processes of a plan's lines, each with a folder of its own.

    Args:
        plan: the plan file.
        out: the folder of the results, the plan's key ``output``.
    """

    def __init__(self, plan: Path, out: Path):
        self._plan, self._out = plan.resolve(), out
        tables = tomllib.loads(plan.read_text("utf-8"))
        self._name = str(tables["compare"].get("name", plan.stem))
        self.lines = lines_of(tables)
        self.whole = out / self._name

    def _command(self, line: Line, cores: str) -> list[str]:
        command = ["taskset", "-c", cores] if shutil.which("taskset") else []
        command += [sys.executable, "-m", "lalora_app.cli.main", "compare", str(self._plan)]
        command += ["--app", str(APP), "--name", f"{self._name}-{line}", "--workers", "1"]
        command += ["--methods", line.label, "--epsilons", str(line.epsilon)]
        return command

    def start(self, line: Line, cores: str) -> subprocess.Popen[bytes]:
        """Start a line, or continue it: its finished runs count."""
        own = self._out / f"{self._name}-{line}"
        env = os.environ | {
            "OMP_NUM_THREADS": "1",  # threads of many lines would wait for each other
            "LALORA_HOME": str(self._out / "home" / own.name),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(APP), os.environ.get("PYTHONPATH")))),
        }
        own.mkdir(parents=True, exist_ok=True)
        with (self._out / f"{own.name}.log").open("ab") as log:
            command = self._command(line, cores)
            return subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def gather(self) -> None:
        """Link the finished runs of all lines into the folder of the whole comparison."""
        for own in [self._out / f"{self._name}-{line}" for line in self.lines]:
            for cell in {summary.parents[1] for summary in own.rglob("summary.json")}:
                link = self.whole / cell.relative_to(own)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(os.path.relpath(cell, link.parent), target_is_directory=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shares_of_cores(each: int) -> Iterator[str]:
    """Yield the cores of one line after another, ``each`` of them, as taskset takes them."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i : i + each] for i in range(0, len(cores), each)]
    return itertools.cycle(",".join(map(str, share)) for share in shares)


def run_all(comparisons: Sequence[Comparison], at_once: int, each: int, deadline: float) -> None:
    """Run all lines, ``at_once`` of them at a time, until the deadline of time.monotonic()."""
    cores = _shares_of_cores(each)
    waiting = [(own, line) for own in comparisons for line in own.lines]
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < at_once:
                own, line = waiting.pop(0)
                running[f"{own.whole.name} {line}"] = own.start(line, next(cores))
            for name in [name for name, process in running.items() if process.poll() is not None]:
                print(f"{name}: exit code {running.pop(name).returncode}", flush=True)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running.values():
            _end(process)


def _accuracies(folder: Path) -> Iterator[str]:
    # rglob follows no links before Python 3.13.
    for file in sorted([*folder.glob("*/*/summary.json"), *folder.glob("tuning/*/*/summary.json")]):
        found = json.loads(file.read_text("utf-8"))
        place = file.parent.parent.relative_to(folder)
        yield f"{place}: {found['status']}, accuracy {found['accuracy']}, {found['seconds']} s"


def main() -> None:
    """Run the lines and link their runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("plan", type=Path, nargs="+", help="plan files of lalora compare")
    add("--out", type=Path, default=Path("~/lalora-results"), help="the plans' key output")
    add("--at-once", type=int, default=cores, help="lines at a time (default: one per core)")
    add("--cores-each", type=int, default=1, help="cores that a line may use (default 1)")
    add("--minutes", type=float, default=float("inf"), help="duration (default: no limit)")
    args = parser.parse_args()
    out = args.out.expanduser().resolve()
    comparisons = [Comparison(plan, out) for plan in args.plan]
    try:
        run_all(comparisons, args.at_once, args.cores_each, time.monotonic() + 60 * args.minutes)
    finally:
        for own in comparisons:
            own.gather()
    for own in comparisons:
        print("\n".join(_accuracies(own.whole)), flush=True)


if __name__ == "__main__":
    main()
