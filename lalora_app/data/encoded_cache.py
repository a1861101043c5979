"""Encoded examples kept for the next call of this process, up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A value that knows its size in memory."""

    def size_in_bytes(self) -> int:
        """Return the approximate number of bytes of memory."""


T = TypeVar("T", bound=Sized)


class EncodedCache(Generic[T]):
    """Keep the most recently used values within a limit of bytes.

    Keys hold a fingerprint of the raw examples, never the examples, so that no raw text or image is
    kept alive. A value above the limit is returned and not kept.

    Args:
        limit: the largest sum of all kept values, in bytes.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def size_in_bytes(self) -> int:
        """Return the bytes of all kept values."""
        return self._used

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()
            self._used = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the kept value of a key, or make it and keep it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._keep(key, value)
        return value

    def _keep(self, key: Hashable, value: T) -> None:
        size = value.size_in_bytes()
        if key in self._values or size > self.limit:
            return
        self._values[key] = value
        self._used += size
        while self._used > self.limit:
            _, oldest = self._values.popitem(last=False)
            self._used -= oldest.size_in_bytes()
