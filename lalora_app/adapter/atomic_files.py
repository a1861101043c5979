"""Files that survive a crash or a power cut: either the old content or the whole new one."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_name(*parts: str) -> str:
    """Return the name of a safetensors file of one dataset, client or run: a hash of its parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32] + ".safetensors"


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; some file systems cannot do so."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Make a folder and its missing parents durably; an existing folder is left as it is.

    Args:
        path: the folder.
        mode: permissions of the folder, if it is new.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True, mode=mode)
    _sync_folder(path.parent)


@contextmanager
def replace_atomically(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """Give a temporary file to write; it replaces ``path`` when the block ends without an error.

    After the block the new file and its name are on the disk, so that a power cut cannot leave an
    empty or a half-written file under ``path``.

    Args:
        path: the final file; its old content stays until the replacement.
        mode: permissions of its folder, if the folder is new.
    """
    make_folder(path.parent, mode=mode)
    new = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield new
        _sync(new)
        new.replace(path)
        _sync_folder(path.parent)
    finally:
        new.unlink(missing_ok=True)
