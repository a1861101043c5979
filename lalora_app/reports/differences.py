"""Differences of every line of a comparison to one reference, paired over seeds.

Two runs of one seed share the partition of the data, the initial adapter and the cohorts. So their
difference varies less than either score, and its interval says whether two lines differ.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lalora_app.reports.table_formats import Table, TableCell
from lalora_app.reports.tables import METRICS, Metric
from lalora_app.results.finished_run import Record, group

CONFIDENCE = 0.95
_ROUNDING = 1e-12  # relative deviation of differences that are equal but for float rounding
_FEW = 2  # seeds with which an interval is wide: t is 12.7


class PairedDifference(NamedTuple):
    """The mean of paired differences, and its confidence interval.

    Attributes:
        seeds: number of pairs.
        mean: mean of the differences, line minus reference.
        half: half the width of the interval; None: unknown.
    """

    seeds: int
    mean: float
    half: float | None

    def verdict(self, *, lower_is_better: bool = False) -> str:
        """Return "better" or "worse" if the interval leaves out 0, else "not distinguishable".

        Limit: without an interval, "–".
        """
        if self.half is None:
            return "–"
        if abs(self.mean) <= self.half:
            return "not distinguishable"
        return "better" if (self.mean < 0) == lower_is_better else "worse"


def paired_difference(
    scores: Mapping[int, float], reference: Mapping[int, float]
) -> PairedDifference | None:
    """Return the mean difference over the seeds that both have, with its 95 % interval.

    The interval is mean ± t · s / √n: s the sample standard deviation of the n differences, t the
    0.975 quantile of Student's distribution with n − 1 degrees of freedom. It holds for differences
    that are about normal.

    Args:
        scores: score by seed.
        reference: score of the reference by seed.

    Returns:
        None without a common seed. No interval for one seed, for scores that are not finite, and
        for differences that are all equal: their deviation of 0 is one of rounded scores.
    """
    pairs = [(scores[seed], reference[seed]) for seed in scores if seed in reference]
    if not pairs:
        return None
    found = [score - other for score, other in pairs]
    mean, largest = statistics.fmean(found), max(abs(score) for pair in pairs for score in pair)
    known = len(found) > 1 and all(map(math.isfinite, found))
    deviation = statistics.stdev(found) if known else 0.0
    if deviation <= _ROUNDING * largest:
        return PairedDifference(len(found), mean, None)
    from scipy.stats import t  # takes a second to import

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(found) - 1))
    return PairedDifference(len(found), mean, quantile * deviation / math.sqrt(len(found)))


def _scores(runs: Sequence[Record], metric: Metric) -> dict[int, float]:
    return {
        run.seed: metric.scale * run.summary[metric.key]
        for run in runs
        if metric.key in run.summary
    }


def _cell(runs: Sequence[Record], reference: Sequence[Record], metric: Metric) -> TableCell:
    found = paired_difference(_scores(runs, metric), _scores(reference, metric))
    if found is None:
        return TableCell("–")
    mean = f"{found.mean:+.{metric.digits}f}"
    if found.half is None:
        return TableCell(f"{mean} [–]")
    ends = (f"{found.mean + side * found.half:+.{metric.digits}f}" for side in (-1, 1))
    wide = ", wide" if found.seeds == _FEW else ""
    verdict = found.verdict(lower_is_better=metric.lower_is_better)
    return TableCell(f"{mean} [{', '.join(ends)}] {verdict}{wide}")


def difference_table(records: Sequence[Record], reference: str, infinity: str = "inf") -> Table:
    """Return the differences of all lines to the reference at equal ε, one row per line and ε.

    Args:
        records: records of finished runs; of one label, ε and seed the last one counts.
        reference: label of the reference.
        infinity: text for ε = inf.

    Returns:
        A table without rows if no other line shares an ε with the reference.
    """
    groups = group(records)
    metrics = [m for m in METRICS if any(m.key in record.summary for record in records)]
    titles = ["method", "ε promised", "seeds", *(metric.title for metric in metrics)]
    rows = []
    for (label, epsilon), runs in groups.items():
        own = groups.get((reference, epsilon))
        if own is None or label == reference:
            continue
        seeds = {run.seed for run in runs} & {run.seed for run in own}
        shown = f"{epsilon:g}" if math.isfinite(epsilon) else infinity
        cells = (_cell(runs, own, metric) for metric in metrics)
        rows.append([TableCell(label), TableCell(shown), TableCell(str(len(seeds))), *cells])
    return Table(titles, rows)


def difference_note(reference: str) -> str:
    """Return the sentence that explains the table."""
    return (
        f"Difference to {reference} at the same ε: mean over the seeds that both lines have, and "
        "in brackets its 95 % confidence interval (Student's t, paired by seed). Better and worse "
        "are told only if the interval leaves out 0; [–]: one seed, or equal differences."
    )
