"""What docs/ quotes is what was measured; what make help says works."""

import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT
from lalora_app.simulation import launch

sys.path.insert(0, str(ROOT / "benchmarks"))

import summary

KEYS = ["model", "phase", "batch", "variant", "cpu_ratio", "wall_ratio", "flops_ratio"]
KEYS += ["kernel_ratio", "saved_ratio", "peak_ratio", "repetitions"]


def test_the_table_of_performance_is_that_of_the_results():
    rows = json.loads(summary.RESULTS.read_text("utf-8"))
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    found = text.split("<!-- table -->\n")[1].split("\n<!-- end -->")[0]
    assert found == summary.table(rows)
    assert all(list(row) == KEYS for row in rows)
    assert {row["cpu_ratio"] for row in rows if row["variant"] == "peft"} == {1.0}


def said(command: str) -> str:
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_example_of_make_help_is_a_run():
    (example,) = re.findall(r"make run ARGS=.*", said("make help"))
    command = shlex.split(said(f"{example} --dry-run --no-print-directory").splitlines()[-1])
    assert command[-4:] == ["run", ".", "-c", 'method="rolora"']
    assert launch.read_launch(ROOT, command[-1:], None).values == {"method": "rolora"}
