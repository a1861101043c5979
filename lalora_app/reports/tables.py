"""The comparison of runs as a table: plain text, Markdown, CSV and LaTeX."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from lalora_app.reports.table_formats import Table, TableCell, as_latex, as_markdown, as_text
from lalora_app.results.finished_run import Record, group


@dataclass(frozen=True)
class Metric:
    """A score on the public test split and its display format.

    Attributes:
        key: key in summaries and histories.
        title: title of the column or axis.
        scale: factor from the stored value to the displayed value.
        digits: number of digits after the decimal point.
        lower_is_better: whether a lower score is better, as for perplexity.
    """

    key: str
    title: str
    scale: float
    digits: int
    lower_is_better: bool = False


ACCURACY = Metric("accuracy", "accuracy %", 100.0, 1)
METRICS = (
    ACCURACY,
    Metric("balanced_accuracy", "balanced accuracy %", 100.0, 1),
    Metric("perplexity", "perplexity", 1.0, 2, lower_is_better=True),
    Metric("average_accuracy", "average of tasks %", 100.0, 1),
    Metric("forgetting", "forgetting %", 100.0, 1, lower_is_better=True),
)


class MeanAndDeviation(NamedTuple):
    """Mean and sample standard deviation over seeds; None for one seed or infinite values."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class RunRow:
    """One row of the table: the runs of one label and one ε, with different seeds.

    Attributes:
        label: label of the runs.
        epsilon: promised ε.
        private: whether every run has a privacy guarantee.
        seeds: number of runs.
        scores: score per key of a metric, as stored (a fraction, not percent).
        epsilon_reached: largest ε of any client in any run.
        upload: uploaded bytes per client and round, mean over seeds.
        download: downloaded bytes per client and round, mean over seeds.
        seconds: duration of a run, median over seeds.
        error_left: relative aggregation error after the server's rule, mean over rounds and seeds;
            None if no round has one.
        epsilon_alone: largest ε of any client's uploads alone, in runs with shared noise; None: no
            run of the row shares noise.
    """

    label: str
    epsilon: float
    private: bool
    seeds: int
    scores: dict[str, MeanAndDeviation]
    epsilon_reached: float
    upload: float
    download: float
    seconds: float
    error_left: float | None = None
    epsilon_alone: float | None = None


def _mean_and_deviation(values: Sequence[float]) -> MeanAndDeviation:
    known = len(values) > 1 and all(map(math.isfinite, values))
    return MeanAndDeviation(statistics.fmean(values), statistics.stdev(values) if known else None)


def _error_left(runs: Sequence[Record]) -> float | None:
    rows = [row.get("remaining_error") for run in runs for row in run.history]
    known = [error for error in rows if error is not None]
    return statistics.fmean(known) if known else None


def _largest_alone(summaries: Sequence[dict[str, Any]]) -> float | None:
    known = [s["epsilon_alone"] for s in summaries if s.get("epsilon_alone") is not None]
    return max(known, default=None)


def _row(label: str, epsilon: float, runs: Sequence[Record]) -> RunRow:
    summaries = [run.summary for run in runs]
    keys = [m.key for m in METRICS if all(m.key in summary for summary in summaries)]
    return RunRow(
        label=label,
        epsilon=epsilon,
        private=all(run.private for run in runs),
        seeds=len(runs),
        scores={key: _mean_and_deviation([summary[key] for summary in summaries]) for key in keys},
        epsilon_reached=max(summary["epsilon_max"] for summary in summaries),
        upload=statistics.fmean(s["upload_bytes_per_round"] for s in summaries),
        download=statistics.fmean(s["download_bytes_per_round"] for s in summaries),
        seconds=statistics.median(summary["seconds"] for summary in summaries),
        error_left=_error_left(runs),
        epsilon_alone=_largest_alone(summaries),
    )


def rows_of(records: Sequence[Record]) -> list[RunRow]:
    """Return one row per label and ε, in the order of ``finished_run.group``."""
    return [_row(label, epsilon, runs) for (label, epsilon), runs in group(records).items()]


def format_score(metric: Metric, spread: MeanAndDeviation) -> str:
    """Return the mean as text, followed by ± and the deviation if there is one."""
    numbers = [n for n in spread if n is not None]
    return " ± ".join(f"{metric.scale * n:.{metric.digits}f}" for n in numbers)


def best_rows(metric: Metric, rows: Sequence[RunRow]) -> list[RunRow]:
    """Return the rows with the best mean, rounded as displayed.

    Returns:
        Several rows if they are equal after rounding. None if fewer than two rows have the metric.
        A NaN mean is never the best, but counts as a row.
    """
    scored = [row for row in rows if metric.key in row.scores]
    means = [round(metric.scale * row.scores[metric.key].mean, metric.digits) for row in scored]
    numbers = [mean for mean in means if not math.isnan(mean)]
    if len(scored) < 2 or not numbers:
        return []
    top = min(numbers) if metric.lower_is_better else max(numbers)
    return [row for row, mean in zip(scored, means, strict=True) if mean == top]


def titles_and_cells(rows: Sequence[RunRow], infinity: str = "inf") -> Table:
    """Return titles and rows of cells of the table; ``infinity`` is the text for ε = inf."""
    metrics = [m for m in METRICS if any(m.key in row.scores for row in rows)]
    titles = ["method", "ε promised", "seeds", *(m.title for m in metrics)]
    shared = any(row.epsilon_alone is not None for row in rows)
    titles += ["largest client ε", *["ε alone"] * shared]
    titles += ["bytes up", "bytes down", "seconds", "error left"]
    leaders = {
        (metric.key, row.label, row.epsilon)
        for metric in metrics
        for _, peers in groupby(rows, key=lambda row: row.epsilon)
        for row in best_rows(metric, list(peers))
    }

    def score(metric: Metric, row: RunRow) -> TableCell:
        if metric.key not in row.scores:
            return TableCell("–")
        leads = (metric.key, row.label, row.epsilon) in leaders
        return TableCell(format_score(metric, row.scores[metric.key]), leads)

    def number(value: float | None, form: str) -> TableCell:
        if value is None:
            return TableCell("–")
        return TableCell(format(value, form) if math.isfinite(value) else infinity)

    cells = [
        [
            *(TableCell(row.label), number(row.epsilon, "g"), TableCell(str(row.seeds))),
            *(score(metric, row) for metric in metrics),
            number(row.epsilon_reached, ".2f"),
            *[number(row.epsilon_alone, ".2f")] * shared,
            *(number(row.upload, ",.0f"), number(row.download, ",.0f")),
            *(number(row.seconds, ".0f"), number(row.error_left, ".2g")),
        ]
        for row in rows
    ]
    return Table(titles, cells)


def to_text(rows: Sequence[RunRow]) -> str:
    """Return the table as plain text with aligned columns."""
    return as_text(titles_and_cells(rows))


def to_markdown(rows: Sequence[RunRow]) -> str:
    """Return the table as Markdown; the best mean per ε is bold."""
    return as_markdown(titles_and_cells(rows))


def to_latex(rows: Sequence[RunRow]) -> str:
    """Return a LaTeX tabular for the package booktabs; the best mean per ε is bold."""
    return as_latex(titles_and_cells(rows, infinity="∞"))


_SUMMARY_COLUMNS = (
    *(metric.key for metric in METRICS),
    *("epsilon_max", "delta", "upload_bytes_per_round", "download_bytes_per_round"),
    *("seconds", "rounds", "status"),
)


def to_csv(records: Sequence[Record]) -> str:
    """Return CSV with one line per run, at full precision; missing values are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    shared = any(run.summary.get("epsilon_alone") is not None for run in records)
    columns = (*_SUMMARY_COLUMNS, *["epsilon_alone"] * shared)
    writer.writerow(["label", "method", "epsilon", "seed", "clients", *columns])
    for runs in group(records).values():
        for run in runs:
            known = [run.summary.get(key) for key in columns]
            writer.writerow([run.label, run.method, run.epsilon, run.seed, run.clients, *known])
    return buffer.getvalue()
