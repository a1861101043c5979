"""Resident factors: trained in a round that did not send them, they wait on the client's disk.

They are made of noised gradients only, so keeping them costs no privacy.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lalora_app.adapter import Adapter, kind
from lalora_app.schedule import Factor, Factors


def resident_file(folder: Path, dataset: str, run: str) -> Path:
    """Return the file of a client's resident factors: one a dataset and run."""
    name = hashlib.sha256(f"{dataset}\n{run}".encode()).hexdigest()[:32]
    return folder / "resident" / f"{name}.safetensors"


def keep(path: Path, adapter: Adapter, factors: Factors, versions: Mapping[Factor, int]) -> None:
    """Replace the resident factors by those of ``adapter``, atomically; none: remove the file.

    Args:
        path: from :func:`resident_file`.
        adapter: the client's adapter at the end of a round.
        factors: those that the round trained and did not send.
        versions: the server's versions that the round started from.
    """
    if not factors:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: array for name, array in adapter.items() if kind(name) in factors}
    new = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, new, metadata={f: str(versions[f]) for f in factors})
    new.replace(path)


def substitute(path: Path, start: Adapter, versions: Mapping[Factor, int]) -> Adapter:
    """Return ``start`` with every resident factor that the server has not re-aggregated since.

    A missing or damaged file, or another version or shape, means the server's copy.
    """
    with contextlib.suppress(SafetensorError, OSError, ValueError):
        with safe_open(path, framework="numpy") as file:
            known = file.metadata()
            valid = {f for f, v in versions.items() if known.get(f) == str(v)}
            kept = {n: file.get_tensor(n) for n in file.keys() if kind(n) in valid}  # noqa: SIM118
        fitting = {n: a for n, a in kept.items() if n in start and a.shape == start[n].shape}
        return start | fitting
    return dict(start)
