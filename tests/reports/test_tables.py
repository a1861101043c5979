"""Test the tables of made-up runs, against plain means and deviations."""

import csv
import io
import math
import re
import statistics

import pytest

from helpers.made_up_runs import BALANCED, record, study
from lalora_app.reports.charts import all_charts as all_charts
from lalora_app.reports.tables import (
    ACCURACY,
    METRICS,
    best_rows,
    rows_of,
    to_csv,
    to_latex,
    to_markdown,
    to_text,
)


def test_a_row_has_the_mean_and_the_sample_deviation_of_its_seeds():
    runs = study()
    for row in rows_of(runs):
        own = [r for r in runs if (r.label, r.epsilon) == (row.label, row.epsilon)]
        for metric in (ACCURACY, BALANCED):
            values = [r.summary[metric.key] for r in own]
            assert row.scores[metric.key].mean == pytest.approx(statistics.mean(values))
            assert row.scores[metric.key].deviation == pytest.approx(statistics.stdev(values))
        assert (row.seeds, row.seconds, row.upload) == (3, 11.0, 150_536)
        assert row.epsilon_reached == row.epsilon
        assert row.private == math.isfinite(row.epsilon)


def test_the_text_is_aligned_and_says_what_the_seeds_were():
    runs = study()
    lines = to_text(rows_of(runs)).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = re.split(r"  +", lines[1])
    values = [100 * r.summary["accuracy"] for r in runs if (r.label, r.epsilon) == ("la-lora", 1.0)]
    expected = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cells[:4] == ["la-lora", "1", "3", expected]
    assert cells[5:] == ["1.00", "150,536", "297,992", "11", "–"]
    assert re.split(r"  +", lines[-1])[1] == "inf"


def test_one_seed_has_no_deviation():
    assert "±" not in to_text(rows_of([record()]))


def test_the_error_left_is_the_mean_of_the_rounds_that_have_one():
    runs = [record(seed=seed) for seed in (0, 1)]
    for run, errors in zip(runs, ((0.5, None, 0.1, None), (None, 0.3, None, 2e-8)), strict=True):
        for row, error in zip(run.history, errors, strict=True):
            row["remaining_error"] = error
    assert rows_of(runs)[0].error_left == pytest.approx((0.5 + 0.1 + 0.3 + 2e-8) / 4)
    assert to_text(rows_of(runs)).splitlines()[1].endswith("  0.23")
    assert rows_of([record()])[0].error_left is None


def test_the_csv_holds_every_run_at_full_precision():
    runs = study()
    lines = list(csv.DictReader(io.StringIO(to_csv(runs))))
    assert len(lines) == len(runs)
    found = {(line["label"], float(line["epsilon"]), int(line["seed"])): line for line in lines}
    for run in runs:
        line = found[run.label, run.epsilon, run.seed]
        assert float(line["accuracy"]) == run.summary["accuracy"]
        assert float(line["epsilon_max"]) == run.summary["epsilon_max"]
        assert (line["perplexity"], line["clients"], line["status"]) == ("", "", "completed")


def test_labels_survive_csv_and_markdown():
    label = 'a,"b"|c*d_e<f>\ng'
    assert next(csv.DictReader(io.StringIO(to_csv([record(label)]))))["label"] == label
    assert r"| a,\"b\"".replace("\\", "") + r"\|c\*d\_e\<f>" in to_markdown(
        rows_of([record(label)])
    )


def test_latex_escapes_its_special_characters():
    escapes = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}"}
    escapes |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "[": "{[}", "*": "{*}"}
    text = to_latex(rows_of([record(label="".join(escapes), epsilon=math.inf)]))
    line = next(line for line in text.splitlines() if line.startswith(escapes["&"]))
    cells = line.split(" & ")
    assert cells[0] == "".join(escapes.values())
    assert cells[1] == cells[5] == r"$\infty$"
    assert re.findall(r"\\(\w+)rule", text) == ["top", "mid", "bottom"]
    assert text.count("&") - text.count(r"\&") == 2 * 9


def test_the_best_mean_of_each_epsilon_is_bold_and_equals_share_it():
    runs = [record(label, epsilon) for label in ("x", "y", "z") for epsilon in (1.0, 3.0)]
    for run, score in zip(runs, (0.9, 0.7, 0.9, 0.6, 0.8, 0.5), strict=True):
        run.summary["accuracy"] = score
    bold = [
        re.findall(r"\\textbf\{(.*?)\}", line)
        for line in to_latex(rows_of(runs)).splitlines()
        if line.startswith(("x", "y", "z"))
    ]
    assert [("90.0" in b, "70.0" in b) for b in bold] == [
        *((True, False), (True, False), (False, False)),
        *((False, True), (False, False), (False, False)),
    ]
    assert to_latex(rows_of(runs)).count(r"\midrule") == 2
    assert "textbf" not in to_latex(rows_of(runs[:1]))


@pytest.mark.parametrize("second", ["balanced_accuracy", "perplexity"])
@pytest.mark.parametrize("place", range(3))
def test_a_score_that_is_nan_takes_the_bold_from_no_other(place, second):
    runs = [record(label, second=second) for label in ("x", "y", "z")]
    for run, score in zip(runs, (7.25, 7.5, 7.25), strict=True):
        run.summary[second] = score
    runs[place].summary[second] = math.nan
    rest = [run.label for i, run in enumerate(runs) if i != place]
    leaders = {
        "balanced_accuracy": ["y"] if "y" in rest else rest,
        "perplexity": [label for label in rest if label != "y"],
    }
    metric = next(metric for metric in METRICS if metric.key == second)
    assert [row.label for row in best_rows(metric, rows_of(runs))] == leaders[second]
    for run in runs:
        run.summary[second] = math.nan
    assert best_rows(metric, rows_of(runs)) == []


def test_a_lower_perplexity_is_better_and_a_metric_that_is_missing_is_a_dash():
    runs = [record("x", second="perplexity"), record("y", second="perplexity"), record("z")]
    runs[0].summary["perplexity"], runs[1].summary["perplexity"] = 7.5, 8.25
    x, y, z = to_markdown(rows_of(runs)).splitlines()[2:]
    assert "| **7.50** |" in x
    assert "| 8.25 |" in y
    # One for the metric that it lacks, one for the error left, which none has.
    assert x.count("–") == y.count("–") == z.count("–") == 2


def test_a_perplexity_that_is_infinite_has_no_deviation():
    runs = [record(seed=seed, second="perplexity") for seed in (0, 1)]
    runs[0].summary["perplexity"] = math.inf
    assert " inf  " in to_text(rows_of(runs)).splitlines()[1]
