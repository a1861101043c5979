"""The charts of a report, each with a note that names omitted runs and the reason."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from lalora_app.aggregation.average import federated_averaging
from lalora_app.methods.table import METHODS
from lalora_app.reports import audit_figure
from lalora_app.reports.figure_style import (
    Curve,
    curve_figure,
    heat_map,
    line_styles,
    report_style,
    share_y_limits,
    svg,
)
from lalora_app.reports.tables import ACCURACY, METRICS, Metric
from lalora_app.results.finished_run import Record, group
from lalora_app.server_state.task_accuracy import KEY

History = list[dict[str, Any]]
Axis = Callable[[History], list[float]]  # history -> one number per round

_AVERAGING_ERROR = Metric(
    "aggregation_error", "relative aggregation error", 1.0, 3, lower_is_better=True
)


_SO_FAR = Metric("accuracy_so_far", "mean accuracy %", 100.0, 1)
_REMAINING_ERROR = Metric("remaining_error", "relative error left", 1.0, 3, lower_is_better=True)


@dataclass(frozen=True)
class Chart:
    """One figure of a report.

    Attributes:
        title: title of the chart.
        note: description below the title, with omitted runs and the reason.
        panels: SVG elements; empty if there is no data.
    """

    title: str
    note: str
    panels: tuple[str, ...]


def mean_curve(runs: Sequence[Record], x: Axis, metric: Metric, above: float = -math.inf) -> Curve:
    """Return the mean curve of a metric over the rounds that all runs have.

    Args:
        runs: runs of one label and ε, with different seeds.
        x: horizontal position of every round of a history.
        metric: the metric; values are multiplied by its scale.
        above: lower limit; a round is omitted if any run has no finite value above it.
    """
    shortest = min(len(run.history) for run in runs)
    histories = [run.history[:shortest] for run in runs]
    values = [[row.get(metric.key) for row in history] for history in histories]
    y = metric.scale * np.array(values, dtype=np.float64)  # None becomes NaN
    xs = np.array([x(history) for history in histories], dtype=np.float64)
    failed = np.array([[not row["aggregated"] for row in history] for history in histories])
    keep = (np.isfinite(y) & np.isfinite(xs) & (y > above)).all(axis=0)
    xs, y, failed = xs[:, keep], y[:, keep], failed[:, keep]
    return Curve(xs.mean(0), y.min(0), y.mean(0), y.max(0), np.any(failed, axis=0))


def _rounds(history: History) -> list[float]:
    return [row["attempt"] for row in history]


def _megabytes(history: History) -> list[float]:
    return [total / 1e6 for total in accumulate(row["upload_bytes"] for row in history)]


def _epsilon_spent(history: History) -> list[float]:
    return [row["epsilon_max"] for row in history]


@report_style()
def _panels(
    records: Sequence[Record], x: Axis, metric: Metric, xlabel: str, *, log: bool = False
) -> tuple[str, ...]:
    """Return one panel per ε that has values, all with equal vertical limits."""
    styles = line_styles(record.label for record in records)
    lowest = 0.0 if log else -math.inf
    figures = {}
    lines = {key: mean_curve(runs, x, metric, lowest) for key, runs in group(records).items()}
    for epsilon in sorted({record.epsilon for record in records}):
        own = {label: line for (label, e), line in lines.items() if e == epsilon and len(line.x)}
        if own:
            figures[epsilon] = curve_figure(own, styles, log=log)
    for epsilon, figure in figures.items():
        axes = figure.axes[0]
        axes.set(title=f"ε = {epsilon:g}", xlabel=xlabel, ylabel=metric.title)
        if x is _rounds:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if figures:
        share_y_limits([figure.axes[0] for figure in figures.values()])
    return tuple(
        svg(figure, f"{metric.title} by {xlabel}, ε = {epsilon:g}")
        for epsilon, figure in figures.items()
    )


def by_round(records: Sequence[Record], metric: Metric) -> Chart:
    """Return the chart of a score on the public test split by round, with failed rounds."""
    name = metric.title.removesuffix(" %")
    note = "On the public test split."
    return Chart(f"{name.capitalize()} by round", note, _panels(records, _rounds, metric, "round"))


def by_task(records: Sequence[Record]) -> list[Chart]:
    """Return the chart of the mean accuracy on the tasks so far; [] for runs without tasks."""
    ended = []
    for record in records:
        rows = [row for row in record.history if KEY in row]
        seen = [r | {"attempt": i, _SO_FAR.key: fmean(r[KEY])} for i, r in enumerate(rows, start=1)]
        ended += [replace(record, history=seen)] if seen else []
    panels = _panels(ended, _rounds, _SO_FAR, "tasks so far") if ended else ()
    note = "The mean over the tasks that have ended, each on its own public test examples."
    return [Chart("Accuracy by task", note, panels)] if panels else []


def by_upload(records: Sequence[Record]) -> Chart:
    """Return the chart of the accuracy by the bytes that one client has uploaded."""
    note = "By the bytes uploaded so far by a client that takes part in every round."
    panels = _panels(records, _megabytes, ACCURACY, "MB sent by one client")
    return Chart("Accuracy by upload", note, panels)


def by_spending(records: Sequence[Record]) -> Chart:
    """Return the chart of the accuracy by the largest ε spent; runs with ε = inf are omitted."""
    note = "By the largest ε that any client has spent so far."
    left_out = list(dict.fromkeys(r.label for r in records if math.isinf(r.epsilon)))
    if left_out:
        note += f" Not shown: runs with ε = inf ({', '.join(left_out)}); they have no finite ε."
    finite = [record for record in records if math.isfinite(record.epsilon)]
    panels = _panels(finite, _epsilon_spent, ACCURACY, "ε spent") if finite else ()
    return Chart("Accuracy by ε spent", note, panels)


def _final_scores(runs: Sequence[Record], metric: Metric, place: int) -> tuple[float, ...]:
    last = [metric.scale * run.summary[metric.key] for run in runs]
    return float(place), min(last), sum(last) / len(last), max(last)


@report_style()
def _budget_panel(records: Sequence[Record], metric: Metric) -> str:
    budgets = sorted({record.epsilon for record in records})
    points: dict[str, list[tuple[float, ...]]] = {}
    for (label, epsilon), runs in group(records).items():
        points.setdefault(label, []).append(_final_scores(runs, metric, budgets.index(epsilon)))
    curves = {}
    for place, (label, ends) in enumerate(points.items()):
        x, low, mean, high = np.array(ends).T
        shift = 0.04 * (place - (len(points) - 1) / 2)  # prevents overlaps of different labels
        curves[label] = Curve(x + shift, low, mean, high, np.zeros(len(x), dtype=np.bool_))
    figure = curve_figure(curves, line_styles(record.label for record in records))
    axes = figure.axes[0]
    axes.set(title="final adapters", xlabel="ε promised", ylabel=metric.title)
    axes.set_xticks(range(len(budgets)), [f"{epsilon:g}" for epsilon in budgets])
    return svg(figure, f"final {metric.title} by ε promised")


def by_budget(records: Sequence[Record]) -> Chart:
    """Return the chart of the scores of the final adapters by the promised ε."""
    metrics = [m for m in METRICS if all(m.key in record.summary for record in records)]
    note = "On the public test split, at the end of the runs."
    panels = tuple(_budget_panel(records, metric) for metric in metrics)
    return Chart("Scores by privacy budget", note, panels)


def _reason_without_curve(runs: Sequence[Record]) -> str:
    """Return the reason why runs have no positive aggregation error to draw."""
    values = [
        row[_AVERAGING_ERROR.key]
        for run in runs
        for row in run.history
        if _AVERAGING_ERROR.key in row
    ]
    method = METHODS.get(runs[0].method)
    if method is not None and method.head_only:
        return "no factor trains"
    if method is not None and method.exact and method.linear:
        return "all clients have the same frozen factor, so the average is exact"
    if 0 in values:
        return "it is 0, which a logarithmic axis cannot show"
    if values:
        if method is not None and method.effective is not None:
            return "its factors depend on gates, masks or bases, which this error does not include"
        return "the server does not have both factors of every client at one rank"
    return "it was not recorded"


def aggregation_error(records: Sequence[Record]) -> Chart:
    """Return the chart of the aggregation error by round; without panels if no run has one."""
    runs_of: dict[str, list[Record]] = {}
    for record in records:
        runs_of.setdefault(record.label, []).append(record)
    reasons: dict[str, list[str]] = {}
    for label, runs in runs_of.items():
        if not any(row.get(_AVERAGING_ERROR.key) for run in runs for row in run.history):
            reasons.setdefault(_reason_without_curve(runs), []).append(label)
    note = (
        "The error of averaging A and B separately: the distance between the product of the "
        "averages and the average of the clients' products, relative to the latter."
    )
    for reason, labels in reasons.items():
        note += f" No curve for {', '.join(labels)}: {reason}."
    panels = _panels(records, _rounds, _AVERAGING_ERROR, "round", log=True)
    return Chart("Aggregation error by round", note, panels)


def remaining_error(records: Sequence[Record]) -> list[Chart]:
    """Return the chart of the error that other rules than averaging leave; [] if there is none."""
    known = [record for record in records if record.method in METHODS]
    correcting = [r for r in known if METHODS[r.method].aggregate is not federated_averaging]
    panels = _panels(correcting, _rounds, _REMAINING_ERROR, "round", log=True) if correcting else ()
    note = (
        "The aggregation error after the method's own rule, base drift included, on the same "
        "scale. For exact methods it is a rounding error."
    )
    return [Chart("Error left by the server's rule", note, panels)] if panels else []


@report_style()
def partitions(records: Sequence[Record]) -> Chart:
    """Return the chart of the data partitions: one heat map per distinct partition."""
    title = "Examples per client"
    owners: dict[str, list[Record]] = {}
    for record in records:
        if record.partition is not None:
            owners.setdefault(json.dumps(record.partition), []).append(record)
    if not owners:
        return Chart(title, "The server does not know how the examples are distributed.", ())
    pictures = []
    for text, runs in owners.items():
        partition = json.loads(text)
        labels = dict.fromkeys(run.label for run in runs)
        owner = "seed " + ", ".join(map(str, sorted({run.seed for run in runs})))
        if len(labels) < len({record.label for record in records}):
            owner += ": " + ", ".join(labels)
        figure = heat_map(partition["labels"], np.array(partition["clients"]), owner)
        pictures.append(svg(figure, f"examples by client and label, {owner}"))
    note = "Training examples per client and label, and in total per client."
    return Chart(title, note, tuple(pictures))


@report_style()
def _roc_panel(record: Record, audit: dict[str, Any]) -> str:
    name = f"{record.label} at ε = {record.epsilon:g}, seed {record.seed}"
    drawn = audit_figure.roc_figure(audit)
    drawn.axes[0].set(title=name)
    return svg(drawn, f"ROC of the audit of {name}")


def audit_rocs(records: Sequence[Record]) -> list[Chart]:
    """Return the chart of the ROC curves of all audits; [] if no run was audited."""
    panels = tuple(_roc_panel(r, r.audit) for r in records if r.audit is not None)
    note = (
        "Success of the attacks of lalora audit, which guess whether an example was in a client's "
        "data. The attacker sees the private step (step; alone: with the example as the only "
        "record) or the uploads of a client in a whole run (run). Logarithmic axes show attacks "
        "that are certain about few examples."
    )
    return [Chart("Membership attack", note, panels)] if panels else []


def all_charts(records: Sequence[Record]) -> list[Chart]:
    """Return all charts of a report in the order of the page.

    Args:
        records: records of finished runs, at least one.
    """
    keys = {key for record in records for row in record.history for key in row}
    budgets = {record.epsilon for record in records}
    return [
        *([by_budget(records)] if len(budgets) > 1 else []),
        *(by_round(records, metric) for metric in METRICS if metric.key in keys),
        *by_task(records),
        by_upload(records),
        by_spending(records),
        aggregation_error(records),
        *remaining_error(records),
        *audit_rocs(records),
        partitions(records),
    ]
