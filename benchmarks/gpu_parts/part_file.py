"""The JSON file of one part, whole at every moment; and the measuring of a part."""

import json
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_parts.settings import Row, Unit

COMPLETE, FAILED, CUT_SHORT, SKIPPED = "complete", "failed", "cut short", "skipped"
_RUNNING = "running"


def write(path: Path, value: Any) -> None:
    """Write JSON in place of a file, so that an interruption leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return the content of a part's file; without a file, a part that has not begun."""
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {"rows": []}


def _shown(row: Mapping[str, Any]) -> str:
    verdict = {True: "ok   ", False: "WRONG"}.get(row.get("ok"), "--   ")
    values = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    return " ".join([verdict, *values])


class PartFile:
    """The rows of a part, written after each of them.

    Args:
        path: the JSON file.
        names: the names of all units.
    """

    def __init__(self, path: Path, names: Iterable[str]):
        self._path = path
        self.content: dict[str, Any] = {
            "status": _RUNNING,
            "missing": list(names),  # units that are not finished
            "errors": {},  # unit -> traceback
            "rows": [],
        }
        write(path, self.content)

    def _add(self, row: Row) -> None:
        print(_shown(row), flush=True)
        self.content["rows"].append(row)
        write(self._path, self.content)

    def measure(self, unit: Unit) -> None:
        """Write the rows of a unit, or the traceback of its exception."""
        try:
            for row in unit.rows():
                self._add(row)
        except Exception:  # whatever a unit raises: the next one runs
            traceback.print_exc()
            self.content["errors"][unit.name] = traceback.format_exc()
        self.content["missing"].remove(unit.name)
        write(self._path, self.content)

    def finish(self) -> bool:
        """Write the status of a part whose units have all run; return whether all went well."""
        wrong = sum(row.get("ok") is False for row in self.content["rows"])
        errors = len(self.content["errors"])
        well = not wrong and not errors
        self.content["status"] = COMPLETE if well else FAILED
        if not well:
            self.content["reason"] = f"{wrong} rows are wrong, {errors} units raised an exception"
        write(self._path, self.content)
        return well


def run_part(path: Path, units: list[Unit]) -> bool:
    """Measure all units of a part in turn; return whether all went well."""
    file = PartFile(path, [unit.name for unit in units])
    for unit in units:
        file.measure(unit)
    return file.finish()


def end(path: Path, status: str, reason: str) -> None:
    """Write the status of a part that did not run, or that did not end by itself."""
    write(path, read(path) | {"status": status, "reason": reason})
