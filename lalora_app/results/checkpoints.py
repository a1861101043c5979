"""Checkpoints of a run: the server's state after each attempt, one file per attempt."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from lalora_app.adapter.atomic_files import replace_atomically
from lalora_app.adapter.factors import Adapter, Array
from lalora_app.adapter.tensor_files import save_tensors
from lalora_app.server_state.state import ServerState

_log = logging.getLogger("flwr")
_KEPT = 2
# Fields of the state beside the adapter; a field's name is the prefix of its tensors in the file.
_FIELDS = ("drift", "first_moment", "second_moment", "average", "memory")


def _digest(tensors: Mapping[str, np.ndarray], numbers: str) -> str:
    """Return a SHA-256 of all contents: safetensors itself does not notice zeroed tensors."""
    found = hashlib.sha256(numbers.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\0".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("attempt-*.safetensors"))


def save(folder: Path, state: ServerState) -> None:
    """Write the state durably, then delete all but the newest checkpoints."""
    numbers = json.dumps(
        {
            "round": state.round,
            "attempts": state.attempts,
            "versions": dict(state.versions),
            "averaged": state.averaged,
            "ranks": dict(state.ranks),
        }
    )
    tensors = state.adapter | {
        f"{field}.{name}": array
        for field in _FIELDS
        for name, array in getattr(state, field).items()
    }
    metadata = {"state": numbers, "digest": _digest(tensors, numbers)}
    with replace_atomically(folder / f"attempt-{state.attempts:05d}.safetensors") as new:
        save_tensors(tensors, new, metadata)
    for old in _files(folder)[:-_KEPT]:
        old.unlink()


def _part(tensors: Mapping[str, Array], field: str) -> Adapter:
    """Return the tensors of one field of the state, by the names that they have there."""
    prefix = f"{field}."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def load(path: Path) -> ServerState:
    """Return the state of one checkpoint.

    Raises:
        Exception: an error of any type, if the file is damaged.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = metadata.get("digest")  # older versions wrote none
    if digest is not None and digest != _digest(tensors, metadata["state"]):
        raise ValueError("the tensors do not match their digest")
    numbers: dict[str, Any] = json.loads(metadata["state"])
    ranks = numbers.pop("ranks", {})  # JSON has made text of the keys; older versions wrote none
    parts: dict[str, Any] = {field: _part(tensors, field) for field in _FIELDS}
    adapter = {n: x for n, x in tensors.items() if n.partition(".")[0] not in _FIELDS}
    lowered = {int(client): rank for client, rank in ranks.items()}
    return ServerState(adapter, **numbers, **parts, ranks=lowered)


def load_undamaged(folder: Path) -> list[ServerState]:
    """Return the states of all undamaged checkpoints, the newest first.

    One line of the log reports each damaged file.
    """
    states = []
    for path in reversed(_files(folder)):
        try:
            states.append(load(path))
        except Exception as error:  # damage shows as many kinds of errors
            kind = type(error).__name__
            _log.warning("LaLoRA checkpoint %s is damaged (%s) and not used", path, kind)
    return states
