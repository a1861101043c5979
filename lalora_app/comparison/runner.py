"""Run all cells of a plan inside one Flower run, so that clients and processes start once."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.serverapp import Grid

from lalora_app.comparison.finished_cells import find_completed, find_finished, tuned_scales
from lalora_app.comparison.plan import Plan, PlanCell, parse_cell
from lalora_app.comparison.plan_file import read_plan
from lalora_app.data.examples import split
from lalora_app.data.task_division import with_names
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.run_config import Config

Run = Callable[[Grid, Config, float], None]  # the last argument: seconds to wait for late nodes
_log = logging.getLogger("flwr")


@dataclass
class Comparison:
    """Runs the unfinished cells of a plan; skips finished ones.

    Args:
        grid: connection to the clients.
        plan: checked plan of the comparison.
        folder: folder of the results.
        run: function that runs one federation.
        settle: seconds for which the first run waits for late nodes; later runs do not wait.
    """

    grid: Grid
    plan: Plan
    folder: Path
    run: Run
    settle: float
    _first: bool = True
    failed: list[str] = field(default_factory=list)

    def _run_cell(self, cell: PlanCell) -> None:
        output = str(self.folder / cell.folder)
        # The saved config.toml must repeat this one run, not the whole comparison.
        config = replace(parse_cell(cell), output=output, compare=NONE)
        first, self._first = self._first, False
        try:
            self.run(self.grid, config, self.settle if first else 0.0)
        except Exception as error:  # the other cells may still succeed
            # If the very first run cannot start (too few nodes, say), no other can: stop.
            if first and isinstance(error, ConfigError) and len(self._missing()) == len(self._all):
                raise ConfigError(f"{cell.folder}: {error}") from error
            _log.error("LaLoRA compare: %s failed: %s", cell.folder, error)
            self.failed.append(f"{cell.folder}: {error}")

    @property
    def _all(self) -> list[PlanCell]:
        return [*self.plan.tuning_cells(), *self.plan.cells({})]

    def _missing(self) -> list[PlanCell]:
        return [cell for cell in self._all if find_finished(self.folder, cell) is None]

    def _check_data(self) -> None:
        """Read the data of all unfinished cells, to report a bad test split before the tuning.

        Raises:
            ConfigError: naming the first cell whose data cannot be used.
        """
        firsts = {parse_cell(cell).data: cell.folder for cell in reversed(self._missing())}
        for data, folder in reversed(firsts.items()):
            try:
                split(with_names(data))
            except ConfigError as error:
                raise ConfigError(f"{folder}: {error}") from error

    def _run_missing(self, cells: list[PlanCell], what: str, later: int = 0) -> None:
        """Run the unfinished cells.

        Args:
            cells: cells of the tuning, or of the comparison.
            what: name of the cells in the log.
            later: number of cells to run afterwards; counted in the estimated time only.

        Raises:
            RuntimeError: at the end, if a run failed.
        """
        missing = [cell for cell in cells if find_completed(self.folder, cell) is None]
        began = time.monotonic()
        for done, cell in enumerate(missing):
            _log.info(
                "LaLoRA compare: %s %d of %d, %s%s",
                *(what, len(cells) - len(missing) + done + 1, len(cells), cell.folder),
                _eta(time.monotonic() - began, done, len(missing) - done + later),
            )
            self._run_cell(cell)
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} runs failed: " + "; ".join(self.failed))

    def finish(self) -> None:
        """Run the tuning and then all cells; stop after an incomplete tuning.

        Raises:
            ConfigError: if the data of an unfinished cell cannot be used, or the very first run
                cannot start.
            RuntimeError: after the tuning, or at the end, if a run failed.
        """
        self._check_data()
        later = [cell for cell in self.plan.cells({}) if not self._begun(cell)]
        self._run_missing(self.plan.tuning_cells(), "tuning run", len(later))
        self._run_missing(self.plan.cells(tuned_scales(self.plan, self.folder)), "run")

    def _begun(self, cell: PlanCell) -> bool:
        return (self.folder / cell.folder).exists()


def _eta(elapsed: float, done: int, left: int) -> str:
    return f", ETA {round(elapsed / done * left / 60)} min" if done else ""


def run_plan(
    grid: Grid, file: str, defaults: Mapping[str, object], run: Run, settle: float
) -> None:
    """Run the unfinished cells of the plan in ``file``; write the results into its folder.

    Args:
        grid: connection to the clients.
        file: plan.json of the comparison.
        defaults: flat run config of the app.
        run: function that runs one federation.
        settle: seconds for which the first run waits for late nodes.

    Raises:
        ConfigError: before anything runs, if the config of one of the cells is not valid.
    """
    path = full_path(file)
    plan = read_plan(json.loads(path.read_text("utf-8")), defaults)
    Comparison(grid, plan, path.parent, run, settle).finish()
