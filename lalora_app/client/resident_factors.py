"""Resident factors: trained in a round that did not send them, they wait on the client's disk.

They are made of noised gradients only, so keeping them costs no privacy.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.adapter.factors import Adapter, Factor, Factors, kind


def resident_file(folder: Path, dataset: str, run: str) -> Path:
    """Return the file of a client's resident factors: one a dataset and run."""
    return folder / "resident" / file_name(dataset, run)


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous.safetensors")


def save_residents(
    path: Path,
    adapter: Adapter,
    factors: Factors,
    versions: Mapping[Factor, int],
    attempt: int,
) -> None:
    """Keep the resident factors of ``adapter``, atomically; none: remove the client's files.

    The ones before stay as well: a round that the server repeats starts where its first try did.

    Args:
        path: from :func:`resident_file`.
        adapter: the client's adapter at the end of a round.
        factors: those that the round trained and did not send.
        versions: the server's versions that the round started from.
        attempt: the server's number of the attempt.
    """
    if not factors:
        path.unlink(missing_ok=True)
        _previous(path).unlink(missing_ok=True)
        return
    # What this attempt sent stays too, as it started: if the attempt fails, its turn comes again.
    tensors = _waiting(path, versions, attempt) | {
        name: array for name, array in adapter.items() if kind(name) in factors
    }
    metadata = {"attempt": str(attempt)} | {str(f): str(v) for f, v in versions.items()}
    with replace_atomically(path) as new:
        save_file(tensors, new, metadata=metadata)
        _set_aside(path, attempt)


def _set_aside(path: Path, attempt: int) -> None:
    """Keep the file of an earlier attempt as the previous one."""
    if _attempt_of(path) < attempt:
        with contextlib.suppress(FileNotFoundError):
            path.replace(_previous(path))


def _attempt_of(path: Path) -> int:
    """Return the attempt that a file was kept at; 0 if it cannot be read."""
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError),
        safe_open(path, framework="numpy") as file,
    ):
        return int((file.metadata() or {}).get("attempt", "0"))
    return 0


def _read(path: Path, versions: Mapping[Factor, int]) -> Adapter:
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError),
        safe_open(path, framework="numpy") as file,
    ):
        known = file.metadata() or {}
        valid = {f for f, v in versions.items() if known.get(f) == str(v)}
        return {n: file.get_tensor(n) for n in file.keys() if kind(n) in valid}  # noqa: SIM118
    return {}


def _waiting(path: Path, versions: Mapping[Factor, int], attempt: int) -> Adapter:
    """Return the valid factors that were kept before ``attempt``, the newest of each."""
    before = _read(_previous(path), versions)
    return before | _read(path, versions) if _attempt_of(path) < attempt else before


def with_residents(
    path: Path, start: Adapter, versions: Mapping[Factor, int], attempt: int
) -> Adapter:
    """Return ``start`` with every resident factor that the server has not re-aggregated since.

    A missing or damaged file, or another version or shape, means the server's copy. What was kept
    by this attempt's own first try is passed over for what was there before it.
    """
    kept = _waiting(path, versions, attempt)
    return start | {n: a for n, a in kept.items() if n in start and a.shape == start[n].shape}
