"""The tables about the GPU in docs/ are those of benchmarks/results/gpu/."""

import json
import re
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_summary

TABLES = [
    ("performance.md", "gpu-eager", gpu_summary.eager_table),
    ("performance.md", "gpu-busy", gpu_summary.busy_table),
    ("performance.md", "gpu-compiled", gpu_summary.compiled_table),
    ("performance.md", "gpu-h200", gpu_summary.h200_table),
    ("results.md", "gpu-study", gpu_summary.study_table),
    ("results.md", "gpu-recipe", gpu_summary.recipe_table),
]
FILES = sorted(gpu_summary.RESULTS.rglob("*.json*"))


@pytest.mark.parametrize(("page", "mark", "table"), TABLES, ids=[mark for _, mark, _ in TABLES])
def test_a_table_in_docs_is_that_of_the_results(page, mark, table):
    text = (ROOT / "docs" / page).read_text("utf-8")
    assert text.split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- end {mark} -->")[0] == table()


def test_the_errors_in_docs_are_the_largest_of_the_checks():
    sums = json.loads((gpu_summary.RESULTS / "checks.json").read_text("utf-8"))["clipped_sums"]
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for start in ("BERT", "RoBERTa", "Swin", "Llama"):
        eager = [r for r in sums if start.lower() in (r["model"], r["model"].split(",")[0])]
        own = [r for r in eager if r["kernel"] != "compiled"]
        single, half = ([r for r in own if r["dtype"] == d] for d in ("float32", "bfloat16"))
        keys = ("worst_error", "worst_stock_error")
        cells = [f"{max(r[key] for r in single):.1e}".replace("e-0", "e-") for key in keys]
        cells += [f"{100 * max(r[key] for r in half):.2f} %" for key in keys]
        (found,) = re.findall(rf"^\| {start}[^|]*\| (\d\.\de-7 .*) \|$", text, re.M)
        assert found.split(" | ") == cells, start


def test_the_results_name_no_path_and_are_all_described():
    page = (gpu_summary.RESULTS / "README.md").read_text("utf-8")
    for path in FILES:
        assert f"`{path.relative_to(gpu_summary.RESULTS)}`" in page
        assert not re.search(r"(?<![\w<])/(?:work|tmp|opt|root|home|usr)/", path.read_text("utf-8"))


def test_the_study_has_27_finished_runs():
    lines = (gpu_summary.RESULTS / "study.jsonl").read_text("utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    assert [run["status"] for run in runs] == ["completed"] * 27
