"""Updates as integers whose sum fits into 32 bits: what masks can be added to and taken off.

A mask is uniform modulo 2^32 and hides any number added to it. So an update, in units of a common
``step``, becomes an integer from ``-levels`` to ``levels``, and the levels are as many as let the
sum over all clients keep its sign: no entry costs more than its float32 did.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lalora_app.adapter.factors import Adapter, Array

Words = NDArray[np.uint32]
Wide = NDArray[np.float64]

# The largest entry of an update that can be sent. Noised updates of a round are smaller by far;
# one that is not is refused, never clipped: a clipped one would move the mean in silence.
MAX_UPDATE = 64.0


class RangeError(ValueError):
    """An update that the masked sum cannot hold."""


def max_level(clients: int) -> int:
    """Return the largest integer of one client with which ``clients`` of them fit a signed sum."""
    return (2**31 - 1) // clients


def step_size(clients: int) -> float:
    """Return the unit of the integers: ``RANGE`` over the levels."""
    return MAX_UPDATE / max_level(clients)


def error_bound(clients: int) -> float:
    """Return how far an entry of the mean can be from the mean of the updates, in float64.

    Half a step, as in each client's rounding; the rest covers the rounding of float64 itself.
    """
    return (0.5 + 2.0**-20) * step_size(clients)


def update_of(upload: Mapping[str, Array], start: Mapping[str, Array]) -> Wide:
    """Return what was added to ``start``, as one flat vector in the order of the names."""
    parts = [upload[n].astype(np.float64) - start[n] for n in sorted(upload)]
    return np.concatenate([part.ravel() for part in parts])


def add_update(start: Mapping[str, Array], update: Wide) -> Adapter:
    """Return the tensors of ``start`` with the update of :func:`update_of` added."""
    ends = np.cumsum([start[n].size for n in sorted(start)])
    parts = np.split(update, ends[:-1])
    return {
        n: (start[n] + part.reshape(start[n].shape)).astype(np.float32)
        for n, part in zip(sorted(start), parts, strict=True)
    }


def quantise(update: Wide, clients: int) -> Words:
    """Return the update in steps, rounded to the nearest, modulo 2^32.

    Args:
        update: of one client.
        clients: how many may be summed.

    Raises:
        RangeError: if an entry is not finite, or beyond ``RANGE``.

    Privacy: a function of a noised update; that it refuses is one, too.
    """
    if not np.isfinite(update).all():
        raise RangeError("an entry of the update is not finite")
    steps = np.rint(update / step_size(clients))
    if np.abs(steps).max(initial=0.0) > max_level(clients):
        raise RangeError(f"an entry of the update is beyond {MAX_UPDATE:g}")
    return steps.astype(np.int64).astype(np.uint32)


def dequantised_mean(total: Words, clients: int, summands: int) -> Wide:
    """Return the mean update from the sum of quantised ones.

    Args:
        total: the sum modulo 2^32.
        clients: as the summands were quantised for.
        summands: how many there are, at most ``clients``.
    """
    return total.view(np.int32).astype(np.float64) * (step_size(clients) / summands)
