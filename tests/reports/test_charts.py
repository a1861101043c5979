"""Test the figures of made-up runs."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from helpers.made_up_runs import record, study, words
from lalora_app.reports import audit_figure, charts
from lalora_app.reports.charts import all_charts as all_charts
from lalora_app.reports.charts import mean_curve
from lalora_app.reports.page import to_html
from lalora_app.reports.tables import ACCURACY


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
        (record("la-lora"), "la-lora: the server does not have both factors"),
        (replace(record("flora"), method="flora"), "flora: the server does not have both"),
        (replace(record("beamlora"), method="beamlora"), "beamlora: its factors depend on gates"),
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
