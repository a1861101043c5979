"""The comparison of runs as a table: plain text, Markdown, CSV and LaTeX."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from lalora_app.results.finished_run import Record, group


@dataclass(frozen=True)
class Metric:
    """A score of the public test split, and how it is shown.

    Attributes:
        key: in summaries and histories.
        title: of its column or axis.
        scale: from the stored number to the shown one.
        digits: shown after the point.
        lower_is_better: as of a perplexity.
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
)


class MeanAndDeviation(NamedTuple):
    """Mean and sample standard deviation over seeds; no deviation where there is none."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class RunRow:
    """The seeds of one label at one ε.

    Attributes:
        label: of the runs.
        epsilon: promised.
        private: whether every run keeps a promise at all.
        seeds: number of runs.
        scores: by the key of the metric, as stored: a fraction, not percent.
        epsilon_reached: the largest ε of any client of any seed.
        upload: bytes that one client sends in a round, mean over seeds.
        download: bytes that one client receives in a round, mean over seeds.
        seconds: median over seeds.
        error_left: of aggregation by the server's rule, relative, mean over rounds and seeds; None
            where no round has it.
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


class TableCell(NamedTuple):
    """One shown value, and whether it is the best mean of its ε."""

    text: str
    best: bool = False


def _mean_and_deviation(values: Sequence[float]) -> MeanAndDeviation:
    known = len(values) > 1 and all(map(math.isfinite, values))
    return MeanAndDeviation(statistics.fmean(values), statistics.stdev(values) if known else None)


def _error_left(runs: Sequence[Record]) -> float | None:
    rows = [row.get("remaining_error") for run in runs for row in run.history]
    known = [error for error in rows if error is not None]
    return statistics.fmean(known) if known else None


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
    )


def rows_of(records: Sequence[Record]) -> list[RunRow]:
    """Return a row for each label and ε, in the order of ``finished_run.group``."""
    return [_row(label, epsilon, runs) for (label, epsilon), runs in group(records).items()]


def format_score(metric: Metric, spread: MeanAndDeviation) -> str:
    """Return the mean as it is shown, with ± where several seeds give a deviation."""
    numbers = [n for n in spread if n is not None]
    return " ± ".join(f"{metric.scale * n:.{metric.digits}f}" for n in numbers)


def best_rows(metric: Metric, rows: Sequence[RunRow]) -> list[RunRow]:
    """Return the rows with the best mean as far as it is shown; none if there is no rival.

    A mean that is NaN has lost, but is a rival: compared with numbers, it would beat or lose to
    them by the order of the rows.
    """
    scored = [row for row in rows if metric.key in row.scores]
    means = [round(metric.scale * row.scores[metric.key].mean, metric.digits) for row in scored]
    numbers = [mean for mean in means if not math.isnan(mean)]
    if len(scored) < 2 or not numbers:
        return []
    top = min(numbers) if metric.lower_is_better else max(numbers)
    return [row for row, mean in zip(scored, means, strict=True) if mean == top]


def titles_and_cells(
    rows: Sequence[RunRow], infinity: str = "inf"
) -> tuple[list[str], list[list[TableCell]]]:
    """Return titles and cells of the table; ``infinity`` is how ε = inf is shown."""
    metrics = [m for m in METRICS if any(m.key in row.scores for row in rows)]
    titles = ["method", "ε promised", "seeds", *(m.title for m in metrics)]
    titles += ["largest client ε", "bytes up", "bytes down", "seconds", "error left"]
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

    def number(value: float, form: str) -> TableCell:
        return TableCell(format(value, form) if math.isfinite(value) else infinity)

    cells = [
        [
            *(TableCell(row.label), number(row.epsilon, "g"), TableCell(str(row.seeds))),
            *(score(metric, row) for metric in metrics),
            *(number(row.epsilon_reached, ".2f"), number(row.upload, ",.0f")),
            *(number(row.download, ",.0f"), number(row.seconds, ".0f")),
            TableCell("–" if row.error_left is None else f"{row.error_left:.2g}"),
        ]
        for row in rows
    ]
    return titles, cells


def to_text(rows: Sequence[RunRow]) -> str:
    """Return the table for a terminal: columns aligned, the first to the left."""
    titles, cells = titles_and_cells(rows)
    lines = [titles, *([cell.text for cell in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = widths
    return "".join(
        "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], rest)]).rstrip() + "\n"
        for line in lines
    )


def to_markdown(rows: Sequence[RunRow]) -> str:
    """Return the table as Markdown; the best mean of each ε is bold."""
    titles, cells = titles_and_cells(rows)

    def show(cell: TableCell) -> str:
        text = re.sub(r"([\\`*_|<\[\]])", r"\\\1", cell.text)
        return f"**{text}**" if cell.best else text

    rule = ["---", *["---:"] * (len(titles) - 1)]
    lines = [titles, rule, *([show(cell) for cell in line] for line in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# "[" and "*" would be read as arguments of the "\\" that ends the line before.
_LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {char: f"{{{char}}}" for char in "[]*"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--"}
    | {"±": r"$\pm$", "ε": r"$\varepsilon$", "∞": r"$\infty$"}
)


def to_latex(rows: Sequence[RunRow]) -> str:
    """Return a tabular for the package booktabs; the best mean of each ε is bold."""
    titles, cells = titles_and_cells(rows, infinity="∞")

    def show(cell: TableCell) -> str:
        text = cell.text.translate(_LATEX)
        return rf"\textbf{{{text}}}" if cell.best else text

    def line(texts: Sequence[str]) -> str:
        return " & ".join(texts) + r" \\" + "\n"

    # A line of cells begins with its label and its ε; a rule parts one ε from the next.
    blocks = groupby(cells, key=lambda cells: cells[1].text)
    body = ["".join(line([show(cell) for cell in row]) for row in block) for _, block in blocks]
    head = line([title.translate(_LATEX) for title in titles])
    return (
        f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}\n\\toprule\n{head}\\midrule\n"
        + "\\midrule\n".join(body)
        + "\\bottomrule\n\\end{tabular}\n"
    )


_SUMMARY_COLUMNS = (
    *(metric.key for metric in METRICS),
    *("epsilon_max", "delta", "upload_bytes_per_round", "download_bytes_per_round"),
    *("seconds", "rounds", "status"),
)


def to_csv(records: Sequence[Record]) -> str:
    """Return one line a run, at full precision; what a run does not have is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["label", "method", "epsilon", "seed", "clients", *_SUMMARY_COLUMNS])
    for runs in group(records).values():
        for run in runs:
            known = [run.summary.get(key) for key in _SUMMARY_COLUMNS]
            writer.writerow([run.label, run.method, run.epsilon, run.seed, run.clients, *known])
    return buffer.getvalue()
