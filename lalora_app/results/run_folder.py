"""What a run leaves: config, history, privacy report, checkpoints, summary. Written atomically."""

import json
import math
import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from lalora_app.aggregation.server_state import ServerState
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import full_path
from lalora_app.settings.run_config import Config, Scalar, flatten, from_tables, parse

_KEPT_CHECKPOINTS = 2
_DRIFT = "drift."  # before the names of what has moved into the base


def _toml_value(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)  # of a float or an int: also TOML, inf included


def as_toml(values: Mapping[str, Scalar]) -> str:
    """Return flat keys and values as TOML that ``flwr run . -c`` takes."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def to_toml(config: Config) -> str:
    """Return the complete run config as TOML."""
    return as_toml(flatten(config))


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".tmp")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


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
        """Where the PEFT adapter goes."""
        return self.path / "adapter"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file; infinities become the string "inf"."""
        clean = {k: _jsonable(v) for k, v in value.items()}
        _write(self.path / name, json.dumps(clean, indent=2, ensure_ascii=False) + "\n")

    def write_config(self, config: Config) -> None:
        """Write the complete config."""
        _write(self.path / "config.toml", to_toml(config))

    def history(self) -> list[dict[str, Any]]:
        """Return the rows written so far, one an attempt."""
        path = self.path / "history.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [{k: math.inf if v == "inf" else v for k, v in row.items()} for row in rows]

    def num_clients(self) -> int | None:
        """Return how many clients the run began with; None if it never got so far."""
        path = self.path / "clients.json"
        return int(json.loads(path.read_text("utf-8"))["clients"]) if path.is_file() else None

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Replace the history."""
        lines = [json.dumps({k: _jsonable(v) for k, v in row.items()}) + "\n" for row in rows]
        _write(self.path / "history.jsonl", "".join(lines))

    def checkpoint(self, state: ServerState) -> None:
        """Write the state after an attempt; keep the last few."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        numbers = {"round": state.round, "attempts": state.attempts, "versions": state.versions}
        path = folder / f"attempt-{state.attempts:05d}.safetensors"
        new = path.with_suffix(".tmp")
        tensors = state.adapter | {_DRIFT + name: array for name, array in state.drift.items()}
        save_file(tensors, new, metadata={"state": json.dumps(numbers)})
        new.replace(path)
        for old in sorted(folder.glob("attempt-*.safetensors"))[:-_KEPT_CHECKPOINTS]:
            old.unlink()

    def latest(self) -> ServerState:
        """Return the newest checkpoint.

        Raises:
            ConfigError: if there is none.
        """
        found = sorted((self.path / "checkpoints").glob("attempt-*.safetensors"))
        if not found:
            raise ConfigError(f'resume-from="{self.path}" must hold a checkpoint')
        with safe_open(found[-1], framework="numpy") as file:
            numbers = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        drift = {n.removeprefix(_DRIFT): x for n, x in tensors.items() if n.startswith(_DRIFT)}
        adapter = {n: x for n, x in tensors.items() if not n.startswith(_DRIFT)}
        counts = (numbers["round"], numbers["versions"], numbers["attempts"])
        return ServerState(adapter, *counts, drift)


def _jsonable(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def read_config(folder: Path) -> Config:
    """Return the config that a run left.

    Raises:
        ConfigError: if the folder is no run's.
    """
    file = folder / "config.toml"
    if not file.is_file():
        raise ConfigError(f"run={folder} must be the folder of a run")
    return parse(from_tables(tomllib.loads(file.read_text("utf-8"))))


def check_writable(output: str) -> None:
    """Make the folder ``output`` if missing, and check that it can be written to.

    Raises:
        ConfigError: if they cannot.
    """
    try:
        folder = full_path(output)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f'output="{output}" must be writable: {reason}') from error


def new_folder(config: Config, name: str) -> RunFolder:
    """Make the folder of a new run, with its config."""
    folder = RunFolder(full_path(config.output) / name)
    folder.path.mkdir(parents=True)
    folder.write_config(config)
    return folder


def old_folder(config: Config, raw: Mapping[str, object]) -> RunFolder:
    """Return the folder named by ``resume-from``, whose config must be the run's own.

    Args:
        config: of the resuming run.
        raw: flat keys and values of the folder's config.toml.

    Raises:
        ConfigError: if a key other than ``resume-from``, ``output`` and ``compare`` differs.
    """
    for key, value in flatten(config).items():
        if key not in ("resume-from", "output", "compare") and raw.get(key) != value:
            raise ConfigError(f"{key}={value!r} must be {raw.get(key)!r}, as in resume-from")
    return RunFolder(full_path(config.resume_from))
