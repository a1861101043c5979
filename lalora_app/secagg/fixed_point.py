"""Conversion between float updates and 32-bit integers, to which masks are added modulo 2^32.

A mask is uniform modulo 2^32, so the sum of mask and number is uniform as well. An update is
divided by a common step size and rounded to an integer from ``-max_level`` to ``max_level``. The
largest level is chosen such that the sum over all clients fits into a signed 32-bit integer. An
entry needs 4 bytes, as in float32.
"""

from collections.abc import Mapping

import numpy as np

from lalora_app.adapter.factors import Adapter, Array
from lalora_app.adapter.low_rank import Float64Array
from lalora_app.shared_noise.lattice import Words

# The largest absolute value of an entry of an update. Noised updates of a round are far smaller.
# A larger entry raises an error; clipping it would change the mean without notice.
MAX_UPDATE = 64.0


class RangeError(ValueError):
    """An update has an entry that is not finite or larger than ``MAX_UPDATE``."""


def max_level(clients: int) -> int:
    """Return the largest integer n with ``clients``·n < 2^31."""
    return (2**31 - 1) // clients


def step_size(clients: int) -> float:
    """Return the step size, the value of the integer 1: ``MAX_UPDATE / max_level(clients)``."""
    return MAX_UPDATE / max_level(clients)


def error_bound(clients: int) -> float:
    """Return the largest possible error of an entry of the mean update, in float64.

    Half a step size, from each client's rounding, plus a small term for the rounding of float64.
    """
    return (0.5 + 2.0**-20) * step_size(clients)


def update_of(upload: Mapping[str, Array], start: Mapping[str, Array]) -> Float64Array:
    """Return ``upload`` minus ``start`` as one flat vector, tensors sorted by name."""
    parts = [upload[n].astype(np.float64) - start[n] for n in sorted(upload)]
    return np.concatenate([part.ravel() for part in parts])


def add_update(start: Mapping[str, Array], update: Float64Array) -> Adapter:
    """Return ``start`` plus the flat vector ``update``; inverse of :func:`update_of`."""
    ends = np.cumsum([start[n].size for n in sorted(start)])
    parts = np.split(update, ends[:-1])
    return {
        n: (start[n] + part.reshape(start[n].shape)).astype(np.float32)
        for n, part in zip(sorted(start), parts, strict=True)
    }


def quantise(update: Float64Array, clients: int) -> Words:
    """Return the update in units of the step size, rounded to nearest, modulo 2^32.

    Args:
        update: the flat update of one client.
        clients: the largest number of updates in a sum.

    Raises:
        RangeError: if an entry is not finite or its absolute value exceeds ``MAX_UPDATE``.

    Privacy: post-processing of a noised update, including the error; no extra cost.
    """
    if not np.isfinite(update).all():
        raise RangeError("an entry of the update is not finite")
    steps = np.rint(update / step_size(clients))
    if np.abs(steps).max(initial=0.0) > max_level(clients):
        raise RangeError(f"an entry of the update is beyond {MAX_UPDATE:g}")
    return steps.astype(np.int64).astype(np.uint32)


def dequantised_mean(total: Words, clients: int, summands: int) -> Float64Array:
    """Return the mean update from the sum of quantised updates.

    Args:
        total: the sum of quantised updates, modulo 2^32.
        clients: the argument ``clients`` of :func:`quantise` for these updates.
        summands: the number of updates in the sum, at most ``clients``.
    """
    return total.view(np.int32).astype(np.float64) * (step_size(clients) / summands)
