"""Many runs in one: the runs of a plan, one after another, over the same clients and processes."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.serverapp import Grid

from lalora_app.config import Config, full_path
from lalora_app.finished import completed, tuned
from lalora_app.plan import Cell, Plan, parse_cell, read_plan

Run = Callable[[Grid, Config, float], None]  # the last: seconds to wait for late nodes
_log = logging.getLogger("flwr")


@dataclass
class Comparison:
    """Runs what is missing of a plan; what is done is left as it is.

    Args:
        grid: to the clients.
        plan: what to run.
        folder: of the results.
        run: runs one federation.
        settle: seconds that the first run waits for late nodes.
    """

    grid: Grid
    plan: Plan
    folder: Path
    run: Run
    settle: float
    failed: list[str] = field(default_factory=list)

    def _run_cell(self, cell: Cell) -> None:
        config = replace(parse_cell(cell), output=str(self.folder / cell.folder))
        try:
            self.run(self.grid, config, self.settle)
        except Exception as error:  # one run that cannot be must not cost the others
            _log.error("LaLoRA compare: %s failed: %s", cell.folder, error)
            self.failed.append(f"{cell.folder}: {error}")
        self.settle = 0.0  # whoever comes late came before the second run

    def _run_missing(self, cells: list[Cell], what: str) -> None:
        missing = [cell for cell in cells if completed(self.folder, cell) is None]
        began = time.monotonic()
        for done, cell in enumerate(missing):
            eta = (time.monotonic() - began) / done * (len(missing) - done) if done else 0.0
            _log.info(
                "LaLoRA compare: %s %d of %d, %s, ETA %d min",
                *(what, len(cells) - len(missing) + done + 1, len(cells), cell.folder),
                round(eta / 60),
            )
            self._run_cell(cell)

    def finish(self) -> None:
        """Tune, then run every cell.

        Raises:
            RuntimeError: at the end, if a run failed.
        """
        self._run_missing(self.plan.tuning_cells(), "tuning run")
        self._run_missing(self.plan.cells(tuned(self.plan, self.folder)), "run")
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} runs failed: " + "; ".join(self.failed))


def run_plan(
    grid: Grid, file: str, defaults: Mapping[str, object], run: Run, settle: float
) -> None:
    """Run what is missing of the plan in ``file``, into the file's folder.

    Raises:
        ConfigError: before anything runs, if one of the runs could not start.
    """
    path = full_path(file)
    plan = read_plan(json.loads(path.read_text("utf-8")), defaults)
    Comparison(grid, plan, path.parent, run, settle).finish()
