"""Tensors on the wire: one array per tensor, and the check of every received byte."""

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from lalora_app.adapter.factors import Adapter

_LARGEST = 1e6  # far above any trained factor; sums of such numbers stay finite


class WireError(ValueError):
    """A message that cannot be used; the text gives the reason and holds no private value."""


def to_record(adapter: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return an adapter as a record: one float32 array per tensor, under PEFT's names."""
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in adapter.items()})


def _array(name: str, array: Array, like: np.ndarray) -> np.ndarray:
    if tuple(array.shape) != like.shape or array.dtype != str(like.dtype):
        raise WireError(
            f"{name} is {array.dtype}{tuple(array.shape)}, and must be {like.dtype}{like.shape}"
        )
    # The header must be exactly the one of this shape and type; it is compared and not parsed,
    # because crafted bytes make a parser raise any error or allocate gigabytes.
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
    """Return the adapter in a record, with the names, shapes and type of ``like``.

    Raises:
        WireError: naming the first tensor that does not fit or is not finite.
    """
    for name in sorted(set(record) ^ set(like)):
        raise WireError(f"{name} is {'unexpected' if name in record else 'missing'}")
    return {name: _array(name, record[name], array) for name, array in like.items()}
