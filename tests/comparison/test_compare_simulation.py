"""`lalora compare` through Flower and Ray, interrupted once and called again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, defaults
from lalora_app.results.run_folder import to_toml
from lalora_app.settings.run_config import flatten

COMPARE = """
[compare]
name = "tiny"
nodes = 2
methods = ["ffa-lora", "la-lora"]
epsilons = [inf]
seeds = [0]
"""


def finished(folder: Path) -> dict[Path, str]:
    """Return the finished runs, each with what its summary says."""
    found = {path: path.read_text("utf-8") for path in sorted(folder.glob("*/*/summary.json"))}
    return {path: text for path, text in found.items() if json.loads(text)["status"] == "completed"}


def wait_for(folder: Path, runs: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while len(finished(folder)) < runs:
        assert process.poll() is None, "the comparison ended early"
        assert time.monotonic() < deadline, "no run was finished in time"
        time.sleep(0.1)


def written_plan(config, folder: Path, compare: str) -> Path:
    """Write the keys of a config that differ from the defaults, and the table ``compare``."""
    plan = folder / "plan.toml"
    changed = [
        line
        for line in to_toml(config).splitlines()
        if flatten(config)[key := line.split(" = ")[0]] != defaults()[key]
        and key != "privacy.epsilon"  # the plan's own
    ]
    plan.write_text("\n".join(changed) + "\n" + compare, "utf-8")
    return plan


def lalora_compare(plan: Path, *options: str) -> list[str]:
    module = ["-m", "lalora_app.cli.main", "compare", str(plan), "--app", str(ROOT)]
    return [sys.executable, *module, *options]


@pytest.mark.slow
@pytest.mark.quiet
@pytest.mark.parametrize("engine", ["local", "flower"])
def test_the_baselines_run_in_one_session_with_the_methods(tiny, tmp_path, engine):
    config = tiny(**{"num-server-rounds": 1, "train.batch-size": 4})
    compare = COMPARE.replace('"la-lora"', '"dp-lora"').replace("nodes = 2", "nodes = 3")
    plan = written_plan(config, tmp_path, compare + "baselines = true\n")
    command = lalora_compare(plan, "--engine", engine)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = Path(config.output) / "tiny"
    runs = {path.parent.parent.name: path.parent for path in finished(folder)}
    one = "ffa-lora--one-client-with-all-data--epsinf-seed0"
    assert set(runs) == {*(f"{m}-epsinf-seed0" for m in ("ffa-lora", "dp-lora", "head-only")), one}
    sizes = {name: json.loads((run / "clients.json").read_text()) for name, run in runs.items()}
    assert {name for name, size in sizes.items() if size == {"clients": 1}} == {one}
    assert "Difference to ffa-lora at the same ε" in done.stdout


@pytest.mark.slow
@pytest.mark.quiet
def test_a_comparison_that_is_ended_and_called_again_runs_the_rest_only(tiny, tmp_path):
    config = tiny(**{"privacy.epsilon": float("inf"), "num-server-rounds": 4})
    plan = written_plan(config, tmp_path, COMPARE)
    folder = Path(config.output) / "tiny"
    command = lalora_compare(plan)
    first = subprocess.Popen(command, start_new_session=True, env=dict(os.environ))
    wait_for(folder, 1, first)
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C
    assert first.wait(60) == 130
    done = finished(folder)
    assert 1 <= len(done) <= 2
    assert (folder / "report.html").is_file()  # of what is done
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout[-2000:]
    both = finished(folder)
    assert len(both) == 2
    assert done.items() <= both.items()  # left as they were, not run again
    for word in ("ffa-lora", "la-lora", "report.html"):
        assert word in again.stdout
