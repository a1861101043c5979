"""Write a finished comparison into docs/results.md: table, tuned learning rates and figures.

python scripts/results.py ~/lalora-results/sst2-minilm configs/bench/sst2-minilm.toml
"""

import argparse
import json
import statistics
import tomllib
from collections import defaultdict
from pathlib import Path

from lalora_app.comparison.finished_cells import accuracy_of, find_completed, tuned_scales
from lalora_app.comparison.plan import MethodAtEpsilon, Plan
from lalora_app.comparison.plan_file import read_plan
from lalora_app.comparison.summary import PLAN, records
from lalora_app.reports.charts import aggregation_error, by_round, by_upload, partitions
from lalora_app.reports.differences import difference_note, difference_table
from lalora_app.reports.table_formats import as_markdown
from lalora_app.reports.tables import ACCURACY, rows_of, to_markdown
from lalora_app.results.finished_run import Record
from lalora_app.settings.run_config import from_tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"


def load(folder: Path) -> Plan:
    """Return the plan in the folder of a comparison."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    tables = json.loads((folder / PLAN).read_text("utf-8"))
    return read_plan(tables, from_tables(app["config"]))


def tuning(plan: Plan, folder: Path) -> str:
    """Return a Markdown table: accuracy on held-out training data by method, ε and scale."""
    scores: dict[tuple[MethodAtEpsilon, float], list[float]] = defaultdict(list)
    for cell in plan.tuning_cells():
        if run := find_completed(folder, cell):
            scores[cell.method_at_epsilon, cell.scale].append(100 * accuracy_of(run))
    chosen, grid = tuned_scales(plan, folder), sorted({scale for _, scale in scores})
    table = ["| method | ε | " + " | ".join(f"rates × {scale:g}" for scale in grid) + " |"]
    table.append("|---" * (len(grid) + 2) + "|")
    lines = dict.fromkeys(cell.method_at_epsilon for cell in plan.tuning_cells())
    tuned = [line for line in lines if all((line, scale) in scores for scale in grid)]
    for line in sorted(tuned, key=lambda line: line[1]):
        means = [statistics.fmean(scores[line, scale]) for scale in grid]
        marks = ["**" if chosen[line] == scale else "" for scale in grid]
        shown = [f"{mark}{mean:.1f}{mark}" for mark, mean in zip(marks, means, strict=True)]
        table.append(f"| {line[0]} | {line[1]:g} | " + " | ".join(shown) + " |")
    return "\n".join(table)


def pictures(found: list[Record], name: str) -> str:
    """Write the figures and return the lines that show them."""
    IMAGES.mkdir(exist_ok=True)
    charts = {
        "by-round": by_round(found, ACCURACY),
        "by-upload": by_upload(found),
        "aggregation-error": aggregation_error(found),
        "partition": partitions(found),
    }
    lines = []
    for kind, chart in charts.items():
        for number, panel in enumerate(chart.panels):
            file = IMAGES / f"{name}-{kind}-{number}.svg"
            file.write_text(panel, "utf-8")
            lines.append(f"![{chart.title}](images/{file.name})")
    return "\n".join(lines)


def section(folder: Path, file: str, *, illustrated: bool) -> str:
    """Return the section of one comparison."""
    plan = load(folder)
    found = records(plan, folder)
    seconds = [record.summary["seconds"] for record in found]
    wanted = len(plan.cells({}))
    parts = [
        f"`lalora compare {file}`: {len(found)} of {wanted} runs, seeds "
        f"{', '.join(map(str, plan.seeds))}, {statistics.median(seconds):.0f} s per run (median; "
        f"{min(seconds):.0f} to {max(seconds):.0f}).",
        to_markdown(rows_of(found)),
    ]
    differing = difference_table(found, plan.reference)
    if differing.cells:
        parts += [difference_note(plan.reference), as_markdown(differing)]
    if plan.tuning:
        parts.append(
            f"Learning rates, by accuracy on {plan.tuning.test_fraction:.0%} of the training data "
            f"(seed {', '.join(map(str, plan.tuning.seeds))}):"
        )
        parts.append(tuning(plan, folder))
    if illustrated:
        parts.append(pictures(found, plan.name))
    return "\n\n".join(parts)


def main() -> None:
    """Replace the section between the markers of the comparison's name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", help="the plan, as the command names it")
    parser.add_argument("--no-pictures", action="store_true", help="where lines are too many")
    args = parser.parse_args()
    begin, end = f"<!-- {args.folder.name} -->", f"<!-- end {args.folder.name} -->"
    before, rest = PAGE.read_text("utf-8").split(begin)
    after = rest.split(end)[1]
    body = section(args.folder.expanduser(), args.file, illustrated=not args.no_pictures)
    text = f"{before}{begin}\n{body}\n{end}{after}"
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
