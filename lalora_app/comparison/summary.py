"""Read and check the plan of a comparison; write tables and report of its finished runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalora_app.adapter.atomic_files import make_folder
from lalora_app.comparison.finished_cells import find_completed, tuned_scales
from lalora_app.comparison.plan import Plan
from lalora_app.comparison.plan_file import check_file, controls_of, read_plan, table_of, to_json
from lalora_app.reports.differences import difference_note, difference_table
from lalora_app.reports.page import write_report
from lalora_app.reports.table_formats import as_latex, as_markdown, as_text
from lalora_app.reports.tables import rows_of, to_csv, to_latex, to_markdown, to_text
from lalora_app.results.finished_run import Record, read_record
from lalora_app.results.run_folder import check_writable
from lalora_app.settings.names import full_path
from lalora_app.settings.overrides import absolute, read_toml
from lalora_app.settings.run_config import from_tables

PLAN = "plan.json"


def read_file(file: Path) -> dict[str, Any]:
    """Return the tables of a plan file: ``compare``, and flat keys with absolute paths.

    Raises:
        ConfigError: if the file cannot be read, or sets a key that its ``compare`` table sets.
    """
    tables, folder = read_toml(file, str(file)), file.parent.resolve()
    own = table_of("compare", tables.get("compare", {}))
    check_file(tables)
    tables.pop("compare", None)
    if "controls" in own:
        controls = controls_of(own["controls"])
        own["controls"] = [c | {"config": absolute(c["config"], folder)} for c in controls]
    keys = absolute(from_tables(tables), folder)
    return {"compare": {"name": file.stem} | own, **keys}


def prepare(tables: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Plan, Path]:
    """Check the plan, write plan.json into the folder of the results, and return both.

    Raises:
        ConfigError: if the config of one of the runs is not valid, or the folder not writable.
    """
    plan = read_plan(tables, defaults)
    folder = full_path(str(plan.config["output"])) / plan.name
    check_writable(str(folder))
    make_folder(folder)
    (folder / PLAN).write_text(to_json(tables), "utf-8")
    return plan, folder


def records(plan: Plan, folder: Path) -> list[Record]:
    """Return the records of the finished runs, in the order of the plan."""
    cells = plan.cells(tuned_scales(plan, folder))
    found = [(cell, find_completed(folder, cell)) for cell in cells]
    return [read_record(run, cell.label) for cell, run in found if run]


def _counts(plan: Plan, folder: Path) -> str:
    """Return the counts of finished and planned runs as text."""
    lines = {"runs": plan.cells(tuned_scales(plan, folder)), "tuning runs": plan.tuning_cells()}
    return " and ".join(
        f"{sum(find_completed(folder, cell) is not None for cell in cells)} of {len(cells)} {what}"
        for what, cells in lines.items()
        if cells
    )


def summarise(plan: Plan, folder: Path, *, latex: bool = False) -> str:
    """Write ``table.md``, ``table.tex``, ``runs.csv`` and ``report.html`` of the finished runs.

    If lines share an ε with the reference, ``differences.md`` and ``differences.tex`` as well.

    Args:
        plan: checked plan of the comparison.
        folder: folder of the results.
        latex: whether the returned text contains the table in LaTeX as well.

    Returns:
        The table and a line with the number of finished runs and the folder. If no run is
        finished, the line alone; no files are written then.
    """
    found = records(plan, folder)
    counts = _counts(plan, folder)
    if not found:
        return f"lalora: {counts} are finished, in {folder}"
    rows = rows_of(found)
    (folder / "table.md").write_text(to_markdown(rows), "utf-8")
    (folder / "table.tex").write_text(to_latex(rows), "utf-8")
    (folder / "runs.csv").write_text(to_csv(found), "utf-8")
    write_report(found, folder / "report.html", plan.name, plan.reference)
    differing = _write_differences(plan, folder, found)
    tables = [to_text(rows), differing, *([to_latex(rows)] if latex else [])]
    where = f"lalora: {counts} are finished; tables, runs.csv and report.html are in {folder}"
    return "\n".join([*filter(None, tables), where])


def _write_differences(plan: Plan, folder: Path, found: list[Record]) -> str:
    """Write the differences to the reference, and return them as text; "" if there are none."""
    table = difference_table(found, plan.reference)
    if not table.cells:
        return ""
    note = difference_note(plan.reference)
    latex = as_latex(difference_table(found, plan.reference, infinity="∞"))
    (folder / "differences.md").write_text(f"{note}\n\n{as_markdown(table)}", "utf-8")
    (folder / "differences.tex").write_text(latex, "utf-8")
    return f"{note}\n{as_text(table)}"
