"""Files that a client keeps between messages: whole or not at all, and named without its data."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_name(*parts: str) -> str:
    """Return the name of a safetensors file that belongs to a dataset, a client or a run."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32] + ".safetensors"


@contextmanager
def replace_atomically(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """Give a file to write, which takes the place of ``path`` once the block has ended well.

    Args:
        path: of the file; the one before stays until then.
        mode: of its folder, if that is new.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=mode)
    new = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
