"""Tables, figures and reports of made-up runs, against slower and plainer routes."""

import csv
import io
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from conftest import defaults, make_config
from lalora_app.reports import audit_figure, charts
from lalora_app.reports.charts import all_charts as all_charts
from lalora_app.reports.charts import mean_curve
from lalora_app.reports.page import to_html, write_report
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
from lalora_app.results.finished_run import Record, group, read_record
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError

BALANCED, PERPLEXITY = METRICS[1:]
LABELS = ("la-lora", "rolora", "dp-lora")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--enable-logging=stderr", "--v=0"),
)


def a_row(t, score, epsilon, *, failed=(), error=None, second="balanced_accuracy", rounds=4):
    return {
        "attempt": t,
        "round": t,
        "phase": "A+B",
        "aggregated": t not in failed,
        "replies": 4,
        "dropped": [],
        "upload_bytes": 150_536,
        "download_bytes": 297_992,
        "epsilon_max": epsilon * (rounds + t) / (2 * rounds),
        "seconds": 1.5,
        "accuracy": score,
        second: 0.9 * score if second == "balanced_accuracy" else 10.0 - score,
        "elapsed": 2.0 * t,
        "aggregation_error": error,
    }


def record(
    label="la-lora", epsilon=3.0, seed=0, rounds=4, config=None, partition=None, **row
) -> Record:
    """A run whose scores are a pure function of its label, ε and seed."""
    chance = random.Random(f"{label} {epsilon} {seed}")
    scores = [0.8 + 0.03 * t + 0.02 * chance.random() for t in range(1, rounds + 1)]
    history = [a_row(t, s, epsilon, rounds=rounds, **row) for t, s in enumerate(scores, 1)]
    keys = ("accuracy", "balanced_accuracy", "perplexity", "epsilon_max")
    method = label if label in LABELS else "la-lora"
    return Record(
        label=label,
        method=method,
        epsilon=epsilon,
        seed=seed,
        config=defaults()
        | {"method": method, "privacy.epsilon": epsilon, "seed": seed}
        | (config or {}),
        summary={
            **{"method": method, "rounds": rounds, "delta": 1e-5, "seconds": 10.0 + seed},
            **{key: history[-1][key] for key in keys if key in history[-1]},
            **{"upload_bytes_per_round": 150_536, "download_bytes_per_round": 297_992},
            "status": "completed",
        },
        history=history,
        partition=partition,
        privacy={"unit": "one example", "accountant": "PRV"},
        clients=None if partition is None else len(partition["clients"]),
    )


def study(epsilons=(1.0, math.inf), seeds=range(3), **changes) -> list[Record]:
    return [record(m, e, s, **changes) for m in LABELS for e in epsilons for s in seeds]


def words(panel: str) -> list[str]:
    found = ElementTree.fromstring(panel).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in found]


# Records


def leave(folder, config, **summary) -> RunFolder:
    """A run's folder as a run leaves it."""
    run = RunFolder(folder)
    folder.mkdir()
    run.write_config(config)
    run.write_json("summary.json", {"method": config.method, **summary})
    run.write_json("privacy.json", {"unit": "one example", "accountant": "PRV"})
    run.write_history(
        [a_row(1, 0.9, config.privacy.epsilon), a_row(2, 0.95, config.privacy.epsilon)]
    )
    return run


@pytest.mark.parametrize("epsilon", [3.0, math.inf])
def test_a_record_is_what_the_run_left(tmp_path, epsilon):
    run = leave(
        tmp_path / "run",
        make_config(**{"privacy.epsilon": epsilon, "seed": 5}),
        epsilon_max=epsilon,
    )
    partition = {"labels": ["ham", "spam"], "clients": [[3, 1], [2, 2], [0, 4]]}
    (run.path / "partition.json").write_text(json.dumps(partition))
    found = read_record(run.path)
    assert (found.label, found.method, found.epsilon, found.seed) == (
        "la-lora",
        "la-lora",
        epsilon,
        5,
    )
    assert found.summary["epsilon_max"] == epsilon
    assert found.history == run.history()
    assert (found.partition, found.clients) == (partition, 3)
    assert found.config["lora.rank"] == defaults()["lora.rank"]
    assert found.private == math.isfinite(epsilon)
    assert read_record(run.path, label="mine").label == "mine"


def test_a_run_without_a_partition_or_a_key_of_today_is_read(tmp_path):
    run = leave(tmp_path / "run", make_config())
    path = run.path / "config.toml"
    path.write_text(
        "".join(
            line for line in path.read_text().splitlines(True) if not line.startswith("lora.kernel")
        )
    )
    found = read_record(run.path)
    assert (found.partition, found.clients) == (None, None)
    assert "lora.kernel" not in found.config


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "privacy.json", "history.jsonl"])
@pytest.mark.parametrize("harm", ["missing", "broken"])
def test_an_unfinished_run_is_refused_by_its_folder(tmp_path, name, harm):
    run = leave(tmp_path / "run", make_config())
    (run.path / name).unlink() if harm == "missing" else (run.path / name).write_text("{")
    with pytest.raises(ConfigError, match=re.escape(f"{run.path} must hold a finished run")):
        read_record(run.path)


def test_groups_begin_with_the_smallest_epsilon_and_keep_the_order_of_labels():
    runs = [record("b", math.inf), record("b", 1.0, 1), record("a", 1.0), record("b", 1.0, 0)]
    found = group(runs)
    assert list(found) == [("b", 1.0), ("a", 1.0), ("b", math.inf)]
    assert [run.seed for run in found["b", 1.0]] == [0, 1]


# Tables


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


# Figures


def test_a_curve_is_mean_lowest_and_highest_over_the_rounds_that_all_seeds_have():
    runs = [record(seed=0, rounds=6), record(seed=1, rounds=4, failed=(2,)), record(seed=2)]
    runs[2].history[2]["accuracy"] = None
    found = mean_curve(runs, lambda history: [row["attempt"] for row in history], ACCURACY)
    assert found.x.tolist() == [1, 2, 4]
    assert found.failed.tolist() == [False, True, False]
    for i, t in enumerate((0, 1, 3)):
        values = [100 * run.history[t]["accuracy"] for run in runs]
        assert found.mean[i] == pytest.approx(statistics.mean(values))
        assert (found.low[i], found.high[i]) == pytest.approx((min(values), max(values)))


def test_uploads_add_up():
    found = mean_curve([record()], charts._megabytes, ACCURACY)
    assert found.x == pytest.approx([0.150536 * t for t in (1, 2, 3, 4)])


def test_without_a_finite_epsilon_there_is_no_figure_of_it():
    chart = charts.by_spending(study(epsilons=[math.inf]))
    assert chart.panels == ()
    assert "ε = inf" in chart.note


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (record("la-lora"), "la-lora: a factor stays on the client"),
        (record("rolora"), "rolora: all clients have the same frozen factor"),
        (record("dp-lora", error=0.0), "dp-lora: it is 0"),
    ],
)
def test_a_missing_aggregation_error_is_explained(run, reason):
    chart = charts.aggregation_error([run])
    assert chart.panels == ()
    assert reason in chart.note


def test_an_aggregation_error_from_before_its_time_was_not_recorded():
    run = record("dp-lora")
    for row in run.history:
        del row["aggregation_error"]
    assert "dp-lora: it was not recorded" in charts.aggregation_error([run]).note


def test_aggregation_errors_are_drawn_where_there_are_any():
    chart = charts.aggregation_error([record("dp-lora", error=0.25), record("la-lora")])
    assert len(chart.panels) == 1
    assert "No curve for la-lora:" in chart.note
    assert "dp-lora" not in chart.note


def test_what_a_server_rule_leaves_is_drawn_for_methods_that_correct_and_no_others():
    def run(method, left):
        own = record(method, 3.0, 0, error=0.2)
        for row in own.history:
            row["remaining_error"] = left
        return replace(own, method=method)

    averaging, correcting = run("dp-lora", 0.2), run("lora-fair", 0.1)
    assert charts.remaining_error([averaging]) == []
    runs = [averaging, correcting, run("flexlora", 0.05)]
    (chart,) = charts.remaining_error(runs)
    assert {"lora-fair", "flexlora"} <= set(words(chart.panels[0]))
    assert "dp-lora" not in words(chart.panels[0])
    assert chart.title in [found.title for found in all_charts(runs)]


@pytest.mark.parametrize("failed", [(), (2, 3)])
def test_failed_rounds_are_marked(failed):
    chart = charts.by_round([record(failed=failed)], ACCURACY)
    found = words(chart.panels[0])
    assert ("failed round" in found) == bool(failed)
    assert {"1", "2", "3", "4"} <= set(found)


def test_language_models_have_curves_of_perplexity():
    found = {chart.title for chart in all_charts([record(second="perplexity")])}
    assert "Perplexity by round" in found
    assert "Balanced accuracy by round" not in found


PART = {"epsilon": 0.8, "curve": 2.4, "p_value": 0.5, "roc": [[0.001, 0.004], [0.01, 0.03], [1, 1]]}
AUDIT = {
    **{"epsilon_upper": 3.0, "epsilon_lower": 0.8, "confidence": 0.95, "mechanism": "lalora"},
    **{"delta": 1e-5, "seed": 0, "broken": False, "parts": {"step": PART, "run": PART}},
}


def test_an_audited_run_tells_both_epsilons_and_draws_the_attack():
    tried = replace(record(), audit=AUDIT)
    page = to_html([tried], "run")
    assert "at least 0.80 at 95% confidence" in page
    assert "counts at most 3.00 at δ = 1e-05. The two are consistent." in page
    assert "BROKEN" in to_html([replace(tried, audit=AUDIT | {"broken": True})], "run")
    (chart,) = charts.audit_rocs([tried, record(seed=1)])
    (panel,) = chart.panels
    assert {"step", "run", "guessing", "allowed at ε = 3", "false positive rate"} <= set(
        words(panel)
    )
    assert charts.audit_rocs([record()]) == []
    assert "Membership attack" not in to_html([record()], "run")


def test_the_hits_allowed_are_those_of_the_definition():
    alarms = np.geomspace(1e-6, 1, 50)
    hits = audit_figure.max_true_positive_rate(alarms, 1.5, 1e-3)
    left = math.exp(1.5) * alarms + 1e-3 - hits
    right = math.exp(1.5) * (1 - hits) + 1e-3 - (1 - alarms)
    assert np.abs(np.minimum(left, right)[hits < 1]).max() < 1e-12
    assert (left > -1e-12).all()
    assert (right > -1e-12).all()
    assert hits[-1] == 1


def test_a_small_partition_has_its_counts_written_in():
    partition = {"labels": ["ham", "spam"], "clients": [[1234, 56], [78, 9]]}
    runs = [record(label, seed=s, partition=partition) for label in ("a", "b") for s in (0, 1)]
    chart = charts.partitions(runs)
    assert len(chart.panels) == 1  # the same for all
    assert {"ham", "spam", "1,234", "56", "78", "9", "seed 0, 1"} <= set(words(chart.panels[0]))


@pytest.mark.parametrize("labels", [2, 77])
def test_the_partition_of_a_hundred_clients_is_drawn(labels):
    counts = np.random.default_rng(0).integers(0, 90, (100, labels)).tolist()
    partition = {"labels": [f"label {i}" for i in range(labels)], "clients": counts}
    (panel,) = charts.partitions([record(partition=partition)]).panels
    assert len(panel) < 200_000
    assert len(words(panel)) < 60


def test_different_partitions_are_different_pictures():
    runs = [record(seed=s, partition={"labels": ["x"], "clients": [[5], [s]]}) for s in (0, 1)]
    titles = [set(words(panel)) for panel in charts.partitions(runs).panels]
    assert ["seed 0" in titles[0], "seed 1" in titles[1]] == [True, True]


def test_partitions_of_different_labels_name_them():
    runs = [record(m, partition={"labels": ["x"], "clients": [[n]]}) for n, m in enumerate("ab")]
    titles = [set(words(panel)) for panel in charts.partitions(runs).panels]
    assert ["seed 0: a" in titles[0], "seed 0: b" in titles[1]] == [True, True]


def test_a_line_that_is_alone_in_its_panel_is_named_beside_others():
    chart = charts.by_round([record("a", 1.0), record("b", 3.0)], ACCURACY)
    assert ["a" in words(chart.panels[0]), "b" in words(chart.panels[1])] == [True, True]


def test_odd_labels_are_drawn_as_they_are():
    labels = ["_hidden", "$x_1$", "日本語", "<b>&amp;", "x" * 200]
    (panel,) = charts.by_round([record(label) for label in labels], ACCURACY).panels
    assert {*labels[:4], "x" * 43 + "…"} <= set(words(panel))


@pytest.mark.parametrize("rounds", [1, 300])
def test_runs_of_one_round_and_of_many_are_drawn(rounds):
    (panel,) = charts.by_round([record(rounds=rounds)], ACCURACY).panels
    assert len(panel) < 100_000
    assert "round" in words(panel)


# Reports


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; collects what the page refers to."""

    VOID = ("meta", "link", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(page: str) -> Balanced:
    found = Balanced()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def comparison() -> str:
    partition = {"labels": ["ham", "spam"], "clients": [[30, 5]] * 4}
    runs = study(error=0.2, partition=partition, config={"output": "/secret/place"})
    runs[0].config["train.lr-a"] = 7.25
    return to_html(runs, "Three methods")


def test_a_comparison_has_a_panel_for_each_epsilon_and_a_legend_in_each(comparison):
    sections = re.findall(r"<section.*?<h3>(.*?)</h3>(.*?)</section>", comparison, re.S)
    found = {title: re.findall(r"<svg.*?</svg>", body, re.S) for title, body in sections}
    assert {title: len(panels) for title, panels in found.items()} == {
        "Scores by privacy budget": 2,
        "Accuracy by round": 2,
        "Balanced accuracy by round": 2,
        "Accuracy by upload": 2,
        "Accuracy by ε spent": 1,
        "Aggregation error by round": 2,
        "Examples per client": 1,
    }
    for panel, title in zip(found["Accuracy by round"], ("ε = 1", "ε = inf"), strict=True):
        assert set(words(panel)) >= {title, "round", "accuracy %", *LABELS}
    assert "Left out, as it spends no finite ε: ε = inf of la-lora, rolora, dp-lora." in comparison


def test_a_comparison_is_one_page_that_fetches_nothing(comparison):
    found = parsed(comparison)
    assert found.tags["svg"] == 2 * 4 + 1 + 2 + 1
    assert (
        found.tags["script"]
        == found.tags["iframe"]
        == found.tags["style"] - found.tags["svg"] - 1
        == 0
    )
    assert max(Counter(found.ids).values()) == 1
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert not re.search(r"url\((?!#)|@import", comparison)


def test_a_comparison_says_what_it_is_and_what_is_not_private(comparison):
    assert "18 runs of la-lora, rolora, dp-lora" in comparison
    assert "at ε = 1, inf, seeds 0, 1, 2" in comparison
    assert "by 4 clients" in comparison
    assert "with ε = 1 and δ = 1e-05" in comparison
    assert comparison.count("<strong>NOT private.</strong>") == 1
    assert comparison.count('<span class="tag">NOT private</span>') == 3  # the rows of ε = inf


def test_settings_that_differ_are_told_from_common_ones(comparison):
    common, differing = comparison.split("Where they differ")
    assert "<dt>lora.rank</dt><dd>8</dd>" in common
    assert "<dt>seed</dt><dd>0, 1, 2</dd>" in common
    assert "train.lr-a</th>" in differing
    assert "<td>7.25, 2.0</td>" in differing
    assert "la-lora at ε = 1: the runs of this mean differ in train.lr-a." in comparison
    assert "/secret/place" not in comparison


def test_the_same_runs_make_the_same_page_whatever_matplotlib_is_set_to():
    before = dict(matplotlib.rcParams)
    page = to_html([record()], "one")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30}):
        assert to_html([record()], "one") == page


def test_a_single_run_is_a_page_too(tmp_path):
    write_report([record(failed=(2,))], tmp_path / "report.html", "la-lora, ε = 3")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert parsed(page).tags["svg"] == 4
    assert "One run of la-lora at ε = 3, seed 0" in page
    assert "la-lora at ε = 3: rounds failed, 1 of 4 (seed 0)." in page
    assert "All settings" in page
    assert "Where they differ" not in page
    assert "NOT private" not in page


@pytest.mark.parametrize(
    ("epsilon", "config", "reason"),
    [
        (math.inf, {}, "no noise was added"),
        (3.0, {"privacy.noise": "seeded"}, "privacy.noise is seeded"),
    ],
)
def test_a_run_that_is_not_private_says_so_and_promises_nothing(epsilon, config, reason):
    page = to_html([record(epsilon=epsilon, config=config)], "one")
    assert f"<strong>NOT private.</strong> la-lora at ε = {epsilon:g}: {reason}" in page
    assert "differential privacy with" not in page


def test_texts_of_configs_and_labels_are_escaped():
    evil = "<script>alert('x')</script>"
    run = record(label=evil, config={"model.name": evil, "data.name": evil})
    found = parsed(page := to_html([run, record()], evil))
    assert found.tags["script"] == 0
    assert page.count("&lt;script&gt;") >= 4


def test_a_seed_that_was_run_twice_is_noted():
    assert "the same seed was run more than once" in to_html([record(), record()], "twice")


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html", "none")


# The page in a browser


def browse(page, tmp_path, width, *options) -> subprocess.CompletedProcess:
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    size = f"--window-size={width},3000"
    command = [CHROMIUM, *QUIET, profile, size, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the report with")
def test_a_browser_shows_the_report_without_errors_and_without_overflow(comparison, tmp_path):
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(comparison, "utf-8")
    seen = browse(page, tmp_path, 1280, f"--screenshot={shot}")
    assert "CONSOLE" not in seen.stderr
    picture = imread(shot)
    assert picture.shape[1] == 1280
    assert all(part.std() > 0.01 for part in np.array_split(picture[..., :3], 6))

    # A copy with a script tells its width; that its message is seen shows that errors would be.
    script = (
        "<script>const d = document.documentElement; d.dataset.over = d.scrollWidth - innerWidth;"
        "d.dataset.hidden = Math.max(...[...document.querySelectorAll('.scroll')]"
        ".map(s => s.scrollWidth - s.clientWidth)); console.error('probe')</script></body>"
    )
    page.write_text(comparison.replace("</body>", script), "utf-8")
    for width in (1280, 500):
        probed = browse(page, tmp_path, width, "--dump-dom")
        assert "CONSOLE" in probed.stderr
        assert int(re.search(r'data-over="(-?\d+)"', probed.stdout)[1]) <= 0
        hidden = int(re.search(r'data-hidden="(-?\d+)"', probed.stdout)[1])
        assert hidden <= 0 if width == 1280 else hidden > 0  # a phone scrolls the table
