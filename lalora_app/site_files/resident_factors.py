"""Resident factors: trained in a round that did not send them, and saved on the client's disk.

Privacy: they are made of noised gradients only, so saving them costs nothing.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.adapter.factors import Adapter, Factor, Factors, kind
from lalora_app.adapter.tensor_files import save_tensors


def resident_file(folder: Path, dataset: str, run: str) -> Path:
    """Return the file of a client's resident factors: one per dataset and run."""
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
    """Save the resident factors of ``adapter`` atomically.

    The file of the attempt before stays as well: a round that the server repeats must start from
    the same factors. Limit: without resident factors, both files are removed.

    Args:
        path: the file from :func:`resident_file`.
        adapter: the client's adapter at the end of a round.
        factors: the factors that the round trained and did not send.
        versions: the server's versions at the start of the round.
        attempt: the server's number of the attempt.
    """
    if not factors:
        path.unlink(missing_ok=True)
        _previous(path).unlink(missing_ok=True)
        return
    # The sent factors stay too, as they were at the start: a failed attempt is repeated.
    tensors = _waiting(path, versions, attempt) | {
        name: array for name, array in adapter.items() if kind(name) in factors
    }
    metadata = {"attempt": str(attempt)} | {str(f): str(v) for f, v in versions.items()}
    with replace_atomically(path) as new:
        save_tensors(tensors, new, metadata)
        _set_aside(path, attempt)


def _set_aside(path: Path, attempt: int) -> None:
    """Rename the file of an earlier attempt to the previous file."""
    if _attempt_of(path) < attempt:
        with contextlib.suppress(FileNotFoundError):
            path.replace(_previous(path))


def _attempt_of(path: Path) -> int:
    """Return the attempt that saved a file; 0 if the file cannot be read."""
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
    """Return the valid factors saved before ``attempt``, the newest of each."""
    before = _read(_previous(path), versions)
    return before | _read(path, versions) if _attempt_of(path) < attempt else before


def with_residents(
    path: Path, start: Adapter, versions: Mapping[Factor, int], attempt: int
) -> Adapter:
    """Return ``start`` with every resident factor that the server has not aggregated since.

    A missing or damaged file, or another version or shape, gives the server's copy. Factors saved
    by an earlier try of this same attempt are ignored.
    """
    saved = _waiting(path, versions, attempt)
    return start | {n: a for n, a in saved.items() if n in start and a.shape == start[n].shape}
