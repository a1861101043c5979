"""The report page: one run or a comparison of runs, as one self-contained HTML file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from lalora_app.reports.charts import all_charts
from lalora_app.reports.differences import difference_note, difference_table
from lalora_app.reports.page_template import TEMPLATE
from lalora_app.reports.privacy_notes import audit_notes, privacy_notes
from lalora_app.reports.table_formats import TableCell, joined
from lalora_app.reports.tables import (
    ACCURACY,
    METRICS,
    MeanAndDeviation,
    RunRow,
    best_rows,
    format_score,
    rows_of,
    titles_and_cells,
)
from lalora_app.results.finished_run import Record, group

_PATH_KEYS = {"output", "resume-from"}  # keys that hold paths; they do not affect the result
_LEGEND = (
    "Mean ± sample standard deviation over seeds, on the public test split. ε is the largest that "
    "any client has spent in any of the runs; bytes are the tensors of one client and round; "
    "seconds are the median."
)


class SummaryTile(NamedTuple):
    """One summary number at the top of the page."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class PageRow:
    """One row of the table.

    Attributes:
        cells: cells of the row.
        private: whether all runs of the row have a privacy guarantee.
        first: whether the row is the first one of its ε (not set for the first row of the table).
    """

    cells: list[TableCell]
    private: bool
    first: bool


def _setting(runs: Sequence[Record], key: str) -> str:
    return joined(run.config.get(key, "not set") for run in runs)


def _trained(records: Sequence[Record]) -> str:
    """Return what the runs train; the rank is that of the runs with factors."""
    adapted = [record for record in records if record.method != "full"]
    whole = ["whole weights of the target layers"] if len(adapted) < len(records) else []
    lora = [f"LoRA adapters of rank {_setting(adapted, 'lora.rank')}"] if adapted else []
    return " or ".join(lora + whole)


def _summary_sentence(records: Sequence[Record]) -> str:
    clients = [record.clients for record in records if record.clients is not None]
    among = f", by {joined(clients)} clients" if clients else ""
    epsilons = joined(f"{record.epsilon:g}" for record in sorted(records, key=lambda r: r.epsilon))
    seeds = joined(sorted(record.seed for record in records))
    plural = "s" if "," in seeds else ""
    runs = f"{len(records)} runs" if len(records) > 1 else "One run"
    return (
        f"{runs} of {joined(record.label for record in records)} at ε = {epsilons}, "
        f"seed{plural} {seeds}: federated fine-tuning of {_setting(records, 'model.name')} with "
        f"{_trained(records)} on "
        f"{_setting(records, 'data.name')}{among}, in {_setting(records, 'num-server-rounds')} "
        f"rounds of {_setting(records, 'train.local-steps')} local steps."
    )


def _warnings(records: Sequence[Record]) -> list[str]:
    noiseless = [record for record in records if math.isinf(record.epsilon)]
    finite = [record for record in records if math.isfinite(record.epsilon)]
    repeatable = [record for record in finite if not record.private]
    found = []
    if noiseless:
        labels = joined(record.label for record in noiseless)
        found.append(f"{labels} at ε = inf: no noise was added, so there is no guarantee.")
    for (label, epsilon), runs in group(repeatable).items():
        noise = _setting(runs, "privacy.noise")
        found.append(
            f"{label} at ε = {epsilon:g}: privacy.noise is {noise}. Noise from a known seed can be "
            "computed again and subtracted, so the ε shown is no guarantee."
        )
    return found


def _row_tiles(row: RunRow) -> list[SummaryTile]:
    scores = [
        SummaryTile(metric.title, format_score(metric, row.scores[metric.key]), "public test split")
        for metric in METRICS
        if metric.key in row.scores
    ]
    promised = f"of {row.epsilon:g} promised" if row.private else "NOT private"
    return [
        *scores,
        SummaryTile("largest client ε", f"{row.epsilon_reached:.2f}", promised),
        *_alone_tile(row),
        SummaryTile("sent", f"{row.upload / 1e3:,.0f} kB", "by one client in one round"),
        SummaryTile(
            "time", f"{row.seconds:,.0f} s", "median of the seeds" if row.seeds > 1 else "in all"
        ),
    ]


def _alone_tile(row: RunRow) -> list[SummaryTile]:
    if row.epsilon_alone is None:
        return []
    return [
        SummaryTile("ε alone", f"{row.epsilon_alone:.2f}", "if one client's uploads are opened")
    ]


def _best_tile(epsilon: float, rows: Sequence[RunRow]) -> SummaryTile:
    leaders = best_rows(ACCURACY, rows)
    title = f"highest accuracy at ε = {epsilon:g}" if leaders else f"accuracy at ε = {epsilon:g}"
    winners = leaders or rows
    mean = format_score(ACCURACY, MeanAndDeviation(winners[0].scores[ACCURACY.key].mean, None))
    return SummaryTile(title, joined(row.label for row in winners), f"{mean} %")


def _tiles(rows: Sequence[RunRow]) -> list[SummaryTile]:
    if len(rows) == 1:
        return _row_tiles(rows[0])
    return [_best_tile(epsilon, list(own)) for epsilon, own in groupby(rows, lambda r: r.epsilon)]


def _settings_of(runs: Sequence[Record]) -> dict[str, str]:
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _PATH_KEYS)
    return {key: _setting(runs, key) for key in keys}


def _notes(records: Sequence[Record]) -> list[str]:
    """Return warnings about means: failed rounds, different settings, repeated seeds."""
    notes = []
    for (label, epsilon), runs in group(records).items():
        name = f"{label} at ε = {epsilon:g}"
        failures = [f"{run.failed} of {len(run.history)} (seed {run.seed})" for run in runs]
        failures = [text for text, run in zip(failures, runs, strict=True) if run.failed]
        if failures:
            notes.append(f"{name}: rounds failed, {', '.join(failures)}.")
        mixed = [
            key
            for key in _settings_of(runs)
            if key != "seed" and len({_setting([run], key) for run in runs}) > 1
        ]
        if mixed:
            notes.append(f"{name}: the runs of this mean differ in {joined(mixed)}.")
        if len({run.seed for run in runs}) < len(runs):
            notes.append(f"{name}: the same seed was run more than once.")
    return notes


def _settings_by_row(records: Sequence[Record]) -> dict[str, Any]:
    """Return the settings that are equal in all rows, and the other settings per row."""
    rows = {key: _settings_of(runs) for key, runs in group(records).items()}
    keys = dict.fromkeys(key for settings in rows.values() for key in settings)
    values = {key: [row.get(key, "not set") for row in rows.values()] for key in keys}
    common = [(key, column[0]) for key, column in values.items() if len(set(column)) == 1]
    told = {"privacy.epsilon", *dict(common)}
    if all(record.label == record.method for record in records):
        told.add("method")
    others = [key for key in keys if key not in told]
    lines = [
        [label, f"{epsilon:g}", *(row.get(key, "not set") for key in others)]
        for (label, epsilon), row in rows.items()
    ]
    return {"common": common, "keys": others, "own": lines if len(rows) > 1 else []}


def _page_rows(rows: Sequence[RunRow], cells: Sequence[list[TableCell]]) -> list[PageRow]:
    before = [None, *(row.epsilon for row in rows)]
    return [
        PageRow(line, row.private, first=previous not in (None, row.epsilon))
        for line, row, previous in zip(cells, rows, before, strict=False)
    ]


def _paired(records: Sequence[Record], reference: str | None) -> dict[str, Any]:
    """Return the table of differences to the reference, empty without one, and its note."""
    if reference is None:
        return {"paired": None, "paired_note": ""}
    table = difference_table(records, reference)
    return {"paired": table if table.cells else None, "paired_note": difference_note(reference)}


def to_html(records: Sequence[Record], title: str, reference: str | None = None) -> str:
    """Return the report as HTML, without scripts and external resources.

    Args:
        records: records of finished runs, at least one; runs of the same label and ε are the seeds
            of one row.
        title: title of the page.
        reference: label to which the other labels are compared; None: no differences are shown.
    """
    rows = rows_of(records)
    titles, cells = titles_and_cells(rows)
    # jinja2 escapes every value except figures; matplotlib escapes the texts of figures.
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE)
    return page.render(
        title=title,
        subject=_summary_sentence(records),
        warnings=_warnings(records),
        privacy=[*privacy_notes(records), *audit_notes(records)],
        tiles=_tiles(rows),
        titles=titles,
        lines=_page_rows(rows, cells),
        legend=_LEGEND,
        notes=_notes(records),
        bands=any(row.seeds > 1 for row in rows),
        charts=all_charts(records),
        **_settings_by_row(records),
        **_paired(records, reference),
    )


def write_report(
    records: Sequence[Record], path: Path, title: str, reference: str | None = None
) -> None:
    """Write the report of one run, or of a comparison, to one HTML file.

    Args:
        records: records of finished runs, at least one.
        path: path of the HTML file; its folder must exist.
        title: title of the page.
        reference: label to which the other labels are compared; None: no differences are shown.

    Raises:
        ValueError: if ``records`` is empty.
    """
    if not records:
        raise ValueError(f"records={records!r} must hold at least one run")
    path.write_text(to_html(records, title, reference) + "\n", "utf-8")
