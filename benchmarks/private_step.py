"""Time and count the private step against stock PEFT, Opacus and torch.func.

All variants of a cell (model, phase, batch) run in turn in one process. Ratios are relative to
stock PEFT without privacy, on the same factors and in the same repetition. The file of results is
written after every cell; a run that was interrupted continues with the next cell.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import COUNTS, Outcome, Plan, measure_cell, ratios, to_rows
from models import ROWS, WHOLE_ROWS
from one_step import PHASES
from variants import COMPILED, GRAPHS, VARIANTS

OUTPUT = Path(__file__).parent / "results" / "private_step.json"
KEY = ("model", "phase", "batch", "variant")
Key = tuple[Any, ...]


class Results:
    """The rows on disk, by cell and variant; variants that cannot run are in a second file."""

    def __init__(self, path: Path | None):
        self._path = path
        self._rows = self._read(path)
        self._failures = self._read(self._beside(path))

    @staticmethod
    def _beside(path: Path | None) -> Path | None:
        return path and path.with_suffix(".failures.json")

    @staticmethod
    def _read(path: Path | None) -> dict[Key, dict]:
        rows = json.loads(path.read_text("utf-8")) if path and path.exists() else []
        return {tuple(row[key] for key in KEY): row for row in rows}

    @staticmethod
    def _write(path: Path | None, rows: dict[Key, dict]) -> None:
        if not path:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")  # after an interruption the old file is unchanged
        lines = ",\n".join(json.dumps(row) for row in rows.values())
        whole.write_text(f"[\n{lines}\n]\n", "utf-8")
        whole.replace(path)

    def _has(self, key: Key, repetitions: int) -> bool:
        found = self._rows.get(key)
        return key in self._failures or bool(found and found["repetitions"] >= repetitions)

    def complete(self, cell: Key, names: list[str], plan: Plan) -> bool:
        """Return whether every variant of the cell has the requested number of repetitions."""
        return all(self._has((*cell, n), plan.repetitions_of(n)) for n in names)

    def add(self, cell: Key, outcomes: dict[str, Outcome]) -> None:
        """Replace the rows of a measured cell and write the files."""
        for name in outcomes:
            self._rows.pop((*cell, name), None)
            self._failures.pop((*cell, name), None)
        self._rows |= {tuple(r[key] for key in KEY): r for r in to_rows(*cell, outcomes)}
        for name, outcome in outcomes.items():
            if outcome.error:
                values = dict(zip(KEY, (*cell, name), strict=True))
                self._failures[*cell, name] = values | {"error": outcome.error}
        self._write(self._path, self._rows)
        self._write(self._beside(self._path), self._failures)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):5.2f} [{min(values):.2f}-{max(values):.2f}]"


def _line(name: str, outcome: Outcome, base: Outcome, row: dict | None) -> str:
    if row is None:
        return f"  {name:17} {outcome.error}"
    times = (
        f"{_spread(ratios(getattr(outcome, clock), getattr(base, clock))):>19}"
        for clock in ("cpu", "wall")
    )
    found = (row[f"{count}_ratio"] for count in COUNTS)
    counts = (f"{'-' if value is None else format(value, '.3f'):>7}" for value in found)
    return f"  {name:17} {' '.join(times)} {' '.join(counts)} {row['repetitions']:>4}"


def table(cell: Key, outcomes: dict[str, Outcome]) -> str:
    """Return the text of a cell: median [min-max] of the ratios, and the counts."""
    rows = {row["variant"]: row for row in to_rows(*cell, outcomes)}
    base = outcomes["peft"]
    seconds = statistics.median(base.wall.values())
    title = f"{cell[0]}, phase {cell[1]}, batch {cell[2]}: a step of peft takes {seconds:.3f} s"
    heads = " ".join(f"{name:>7}" for name in COUNTS)
    head = f"  {'':17} {'CPU time':>19} {'wall time':>19} {heads}    n"
    lines = (_line(n, outcome, base, rows.get(n)) for n, outcome in outcomes.items())
    return "\n".join([title, head, *lines])


def _names(known: Any):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return names

    return parse


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a look in a minute or two; writes no file")
    add("--models", type=_names(ROWS | WHOLE_ROWS), default=list(ROWS))
    add("--phases", type=_names(PHASES), default=list(PHASES))
    add("--batches", type=_sizes, default=[16, 64])
    default = [name for name in VARIANTS if name not in COMPILED | GRAPHS]
    add("--variants", type=_names(VARIANTS), default=default)
    add("--repetitions", type=int, default=20)
    add("--slow-repetitions", type=int, default=5, help="of variants that no gate hangs on")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    add("--output", type=Path, default=None, help=f"by default {OUTPUT.name} in results/")
    add("--again", action="store_true", help="measure also what the file holds already")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.phases = ["minilm", "swin-small-64"], ["A", "B"]
        arguments.batches, arguments.repetitions, arguments.slow_repetitions = [8], 3, 1
    elif arguments.output is None:
        arguments.output = OUTPUT
    return arguments


def main() -> None:
    """Measure the requested cells that have not been measured yet."""
    arguments = _arguments()
    warnings.simplefilter("ignore")  # warnings of the compared libraries would break the tables
    plan = Plan(
        arguments.repetitions,
        arguments.slow_repetitions,
        torch.device(arguments.device),
        getattr(torch, arguments.dtype),
    )
    names = ["peft", *(name for name in arguments.variants if name != "peft")]
    results = Results(arguments.output)
    cells = list(product(arguments.models, arguments.phases, arguments.batches))
    for i, cell in enumerate(cells, 1):
        if not arguments.again and results.complete(cell, names, plan):
            print(f"cell {i} of {len(cells)}: on file", file=sys.stderr)
            continue
        start = time.perf_counter()
        outcomes = measure_cell(*cell, names, plan)
        results.add(cell, outcomes)
        seconds = time.perf_counter() - start
        print(f"cell {i} of {len(cells)}: {seconds:.0f} s", file=sys.stderr)
        print(table(cell, outcomes), flush=True)


if __name__ == "__main__":
    main()
