"""What docs/ quotes is what was measured."""

import json
import sys

from conftest import ROOT

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
