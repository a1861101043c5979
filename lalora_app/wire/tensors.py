"""Tensors on the wire: one array a tensor, and the judgement of every byte that comes in."""

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from lalora_app.adapter.factors import Adapter

_LARGEST = 1e6  # no factor that trains comes near it, and sums of such numbers stay finite


class WireError(ValueError):
    """A message that cannot be used; the text says why, and holds no private value."""


def to_record(adapter: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Pack an adapter: one float32 array a tensor, under PEFT's names."""
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in adapter.items()})


def _array(name: str, array: Array, like: np.ndarray) -> np.ndarray:
    if tuple(array.shape) != like.shape or array.dtype != str(like.dtype):
        raise WireError(
            f"{name} is {array.dtype}{tuple(array.shape)}, and must be {like.dtype}{like.shape}"
        )
    # The bytes are judged, not parsed: exactly the header that this shape and type have, then
    # the numbers. A parser could be made to raise almost anything, or to ask for gigabytes.
    pattern = Array(np.zeros(like.shape, like.dtype))
    header = pattern.data[: len(pattern.data) - like.nbytes]
    fits = array.stype == pattern.stype and len(array.data) == len(pattern.data)
    if not fits or not array.data.startswith(header):
        raise WireError(f"{name} must be the bytes of one array of its shape and type")
    values = np.frombuffer(array.data, like.dtype, offset=len(header)).reshape(like.shape)
    if like.dtype.kind == "f" and not (np.abs(values) <= _LARGEST).all():  # nor NaN
        raise WireError(f"{name} must hold finite {like.dtype}{like.shape} up to {_LARGEST:g}")
    return values.copy()


def from_record(record: ArrayRecord, like: Mapping[str, np.ndarray]) -> Adapter:
    """Unpack an adapter that must have the names, shapes and type of ``like``, and be finite.

    Raises:
        WireError: naming the first tensor that does not fit.
    """
    for name in sorted(set(record) ^ set(like)):
        raise WireError(f"{name} is {'unexpected' if name in record else 'missing'}")
    return {name: _array(name, record[name], array) for name, array in like.items()}
