"""Find the finished runs of a comparison, and check that they ran with the plan's settings."""

import tomllib
from pathlib import Path
from typing import Any

from lalora_app.comparison.plan import MethodAtEpsilon, Plan, PlanCell
from lalora_app.results import strict_json
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import OPEN, from_tables

_FREE = {"output", "resume-from", "compare"}  # may differ between two attempts of a cell


def _summary(run: Path) -> dict[str, Any]:
    file = run / "summary.json"
    try:
        return dict(strict_json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON, as a run writes it: {error}") from error


def find_finished(folder: Path, cell: PlanCell) -> Path | None:
    """Return the folder of a cell's finished run, with any settings; None if there is none."""
    for path in sorted((folder / cell.folder).glob("*/summary.json")):
        if _summary(path.parent)["status"].startswith("completed"):
            return path.parent
    return None


def find_completed(folder: Path, cell: PlanCell) -> Path | None:
    """Return the folder of a cell's finished run; None if there is none.

    Raises:
        ConfigError: if the run had other settings than the cell.
    """
    run = find_finished(folder, cell)
    if run:
        _require_same(run, cell)
    return run


def _require_same(run: Path, cell: PlanCell) -> None:
    saved = from_tables(tomllib.loads((run / "config.toml").read_text("utf-8")))
    if gone := saved.keys() - cell.config.keys():
        raise ConfigError(
            f"{run} was run with {min(gone)}, which is no key of a run any more; a comparison with "
            "other keys needs another compare.name"
        )
    # A key that the run lacks is newer, and a new key's default changes no run.
    old = {**cell.defaults, **saved}
    for key, value in cell.config.items():
        if key not in _FREE and value != OPEN.get(key) and old.get(key) != value:
            raise ConfigError(
                f"{key}={value!r} must be {old.get(key)!r}, as in the finished run {run}; a "
                "comparison with other settings needs another compare.name"
            )


def accuracy_of(run: Path) -> float:
    """Return the final accuracy of a finished run."""
    return float(_summary(run)["accuracy"])


def tuned_scales(plan: Plan, folder: Path) -> dict[MethodAtEpsilon, float]:
    """Return the best scale of the learning rates per method and ε, by the finished tuning runs."""
    runs = [(cell, find_completed(folder, cell)) for cell in plan.tuning_cells()]
    return plan.best([(cell, accuracy_of(run)) for cell, run in runs if run])
