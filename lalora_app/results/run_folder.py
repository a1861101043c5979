"""The folder of a run: config, history, privacy report, checkpoints, summary, all durable."""

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalora_app.adapter.atomic_files import make_folder, replace_atomically
from lalora_app.results import checkpoints, strict_json
from lalora_app.server_state.state import ServerState
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import full_path
from lalora_app.settings.overrides import read_toml
from lalora_app.settings.run_config import OPEN, Config, Scalar, flatten, from_tables, parse

_log = logging.getLogger("flwr")
Row = dict[str, Any]


def _toml_value(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)  # of a float or an int this is TOML, also of inf


def as_toml(values: Mapping[str, Scalar]) -> str:
    """Return flat keys and values as TOML that ``flwr run . -c`` takes."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def to_toml(config: Config) -> str:
    """Return the complete run config as TOML."""
    return as_toml(flatten(config))


def _write(path: Path, text: str) -> None:
    with replace_atomically(path) as new:
        new.write_text(text, encoding="utf-8")


def _parsed(lines: list[str]) -> list[Row]:
    """Return the rows before the first line that is not a JSON object."""
    rows: list[Row] = []
    for line in lines:
        try:
            row = strict_json.loads(line)
        except ValueError:
            return rows
        if not isinstance(row, dict):
            return rows
        rows.append(row)
    return rows


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins or goes on.

    Attributes:
        state: the server's state before the next attempt.
        rows: the history up to the state, one row per attempt.
        epsilon_spent: the largest ε that any client has reported, also in attempts that are
            repeated now.
    """

    state: ServerState
    rows: list[Row] = field(default_factory=list)
    epsilon_spent: float = 0.0


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; its name is the run's name in every ledger."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter."""
        return self.path / "adapter"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file; see :mod:`strict_json` for numbers that are not finite."""
        _write(self.path / name, strict_json.dumps(dict(value), indent=2) + "\n")

    def write_config(self, config: Config) -> None:
        """Write the complete config."""
        _write(self.path / "config.toml", to_toml(config))

    def _history_lines(self) -> list[str]:
        path = self.path / "history.jsonl"
        if not path.exists():
            return []
        return path.read_text("utf-8", errors="replace").splitlines()

    def history(self) -> list[Row]:
        """Return all rows, one per attempt.

        Raises:
            ConfigError: if a line is damaged.
        """
        lines = self._history_lines()
        rows = _parsed(lines)
        if len(rows) < len(lines):
            line = len(rows) + 1
            raise ConfigError(f"{self.path / 'history.jsonl'}: line {line} must be a JSON object")
        return rows

    def num_clients(self) -> int | None:
        """Return the number of clients at the start of the run; None: it had not started.

        Raises:
            ConfigError: for a damaged file.
        """
        path = self.path / "clients.json"
        if not path.is_file():
            return None
        try:
            return int(json.loads(path.read_text("utf-8"))["clients"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} must be an object with the number of clients") from error

    def write_history(self, rows: list[Row]) -> None:
        """Replace the history."""
        _write(self.path / "history.jsonl", "".join(strict_json.dumps(r) + "\n" for r in rows))

    def checkpoint(self, state: ServerState) -> None:
        """Write the state after an attempt; keep the two newest checkpoints."""
        checkpoints.save(self.path / "checkpoints", state)

    def _states(self) -> list[ServerState]:
        """Return the states of all undamaged checkpoints, the newest first.

        Raises:
            ConfigError: if there is none.
        """
        if found := checkpoints.load_undamaged(self.path / "checkpoints"):
            return found
        raise ConfigError(f'resume-from="{self.path}" must hold a checkpoint that is not damaged')

    def latest(self) -> ServerState:
        """Return the state of the newest undamaged checkpoint.

        Raises:
            ConfigError: if there is none.
        """
        return self._states()[0]

    def resume_point(self) -> ResumePoint:
        """Return the newest undamaged checkpoint that has a complete history, with that history.

        Rows of later attempts are left out: those attempts are repeated. A client answers a
        repeated request from its last reply, or reserves budget for it as for any other.

        Raises:
            ConfigError: if every checkpoint is damaged, or every history is.
        """
        states, lines = self._states(), self._history_lines()
        rows = _parsed(lines)
        if len(rows) < len(lines):
            file = self.path / "history.jsonl"
            _log.warning("LaLoRA %s is damaged from line %d on", file, len(rows) + 1)
        attempts = [row.get("attempt") for row in rows]
        spent = max((float(row.get("epsilon_max", math.inf)) for row in rows), default=0.0)
        for state in states:
            if attempts[: state.attempts] == list(range(1, state.attempts + 1)):
                return ResumePoint(state, rows[: state.attempts], spent)
            _log.warning(
                "LaLoRA checkpoint of attempt %d is not used: the history has %d whole rows",
                *(state.attempts, len(rows)),
            )
        raise ConfigError(
            f'resume-from="{self.path}" must hold the history of its checkpoint: history.jsonl has '
            f"{len(rows)} whole rows, and attempt {states[-1].attempts} needs as many"
        )


def read_config(folder: Path) -> Config:
    """Return the config of an existing run.

    Raises:
        ConfigError: if the folder is not that of a run.
    """
    file = folder / "config.toml"
    if not file.is_file():
        raise ConfigError(f"run={folder} must be the folder of a run")
    return parse(from_tables(read_toml(file, str(file))))


def check_writable(output: str) -> None:
    """Check that the folder ``output`` is writable, or can be made; nothing is made or left.

    Raises:
        ConfigError: if it cannot be made or written.
    """
    folder = full_path(output)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f'output="{output}" must be writable: {reason}') from error


def new_folder(config: Config, name: str) -> RunFolder:
    """Make the folder of a new run, with its config."""
    folder = RunFolder(full_path(config.output) / name)
    make_folder(folder.path.parent)
    folder.path.mkdir()
    folder.write_config(config)
    return folder


def old_folder(config: Config, raw: Mapping[str, object]) -> RunFolder:
    """Return the folder named by ``resume-from``, whose config must be the run's own.

    Args:
        config: the config of the resuming run.
        raw: flat keys and values of the folder's config.toml.

    Raises:
        ConfigError: if a key other than ``resume-from``, ``output`` and ``compare`` differs.
    """
    for key, value in flatten(config).items():
        own = raw.get(key)
        free = key in ("resume-from", "output", "compare") or (key in OPEN and own == OPEN[key])
        if not free and own != value:
            raise ConfigError(
                f"{key}={value!r} must be {own!r}, as in resume-from; "
                f"{config.resume_from}/config.toml holds all keys of the run"
            )
    return RunFolder(full_path(config.resume_from))
