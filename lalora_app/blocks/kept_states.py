"""Hidden states of examples, kept in memory or in a file up to a number of bytes.

An entry is found by its key, the SHA-256 of one example and of all that decides on its states. So
the entry of another example or of other weights is never returned.
"""

import contextlib
import errno
import hashlib
import os
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from lalora_app.adapter.atomic_files import make_folder

MEMORY_BYTES = 1 << 30  # of all examples in one process
FILE_BYTES = 8 << 30  # of one client's file
_DIGEST = hashlib.sha256().digest_size


def _ends(sizes: Sequence[int], limit: int) -> list[int]:
    """Return the end of a file's name and of the places that follow it, as far as they fit."""
    ends = list(accumulate((_DIGEST + size for size in sizes), initial=_DIGEST))
    return ends[: bisect_right(ends, limit)]


def room_for(sizes: Sequence[int], limit: int) -> int:
    """Return how many of the first examples fit into a limit of bytes."""
    return max(len(_ends(sizes, limit)) - 1, 0)


class KeptStates(Protocol):
    """The hidden states of a client's examples, as bytes."""

    def read(self, index: int, key: bytes) -> bytes | None:
        """Return the entry of an example; None: it is not kept."""

    def write(self, index: int, key: bytes, states: bytes) -> None:
        """Keep the entry of an example, if there is room for it."""


class StatesInMemory:
    """The most recently used entries of a process, for all its clients and models.

    Args:
        limit: the largest number of bytes of all entries with their keys.
    """

    def __init__(self, limit: int = MEMORY_BYTES):
        self._limit, self._used = limit, 0
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()

    def size_in_bytes(self) -> int:
        """Return the bytes of all entries with their keys."""
        return self._used

    def read(self, index: int, key: bytes) -> bytes | None:
        """Return the entry of a key, wherever its example stands; None: it is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def write(self, index: int, key: bytes, states: bytes) -> None:
        """Keep an entry; the entries that were not used for longest make room."""
        if key in self._entries or _DIGEST + len(states) > self._limit:
            return
        self._entries[key] = states
        self._used += _DIGEST + len(states)
        while self._used > self._limit:
            _, oldest = self._entries.popitem(last=False)
            self._used -= _DIGEST + len(oldest)


class StatesInFile:
    """One file with a place for each example of a client, as far as the limit allows.

    The file begins with ``name``. A place holds the SHA-256 of key and states, and the states. So a
    place that is empty, damaged, half-written or of another example or model is not read. Reads and
    writes go by position and not by a memory map: a full disk or a cut file then gives an error or
    no entry, and not a signal that ends the process.

    Args:
        path: the file, made for this user only if it is missing.
        name: a SHA-256 of everything that all entries share; a file of another name is emptied.
        sizes: the number of bytes of each example's states.
        limit: the largest number of bytes of the file.

    Attributes:
        emptied: whether the file was one of another name.

    Raises:
        OSError: if the file cannot be opened, or is a link or another user's.
    """

    def __init__(self, path: Path, name: bytes, sizes: Sequence[int], limit: int = FILE_BYTES):
        make_folder(path.parent, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "the file belongs to another user", str(path))
        os.fchmod(self._file, 0o600)
        self._ends = _ends(sizes, limit)
        found = os.pread(self._file, _DIGEST, 0)
        self.emptied = bool(found) and found != name
        if found != name:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, name, 0)

    def _place(self, index: int) -> tuple[int, int] | None:
        """Return the position and the bytes of an example's place; None: beyond the limit."""
        if index + 1 >= len(self._ends):
            return None
        return self._ends[index], self._ends[index + 1] - self._ends[index]

    def read(self, index: int, key: bytes) -> bytes | None:
        """Return the states of an example; None: its place does not hold them."""
        place = self._place(index)
        if place is None:
            return None
        start, size = place
        try:
            found = os.pread(self._file, size, start)
        except OSError:  # of the disk: the states are computed again
            return None
        digest, states = found[:_DIGEST], found[_DIGEST:]
        whole = len(found) == size and hashlib.sha256(key + states).digest() == digest
        return states if whole else None

    def write(self, index: int, key: bytes, states: bytes) -> None:
        """Write the states of an example to its place; on a full disk nothing is kept."""
        place = self._place(index)
        if place is None:
            return
        start, size = place
        if len(states) + _DIGEST != size:
            raise ValueError(f"states of example {index} must have {size - _DIGEST} bytes")
        with contextlib.suppress(OSError):
            os.pwrite(self._file, hashlib.sha256(key + states).digest() + states, start)
