"""An adapter as a flat mapping from PEFT's tensor names to arrays, and what travels of it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Factor = Literal["A", "B"]

Factors = frozenset[Factor]

A: Factors = frozenset({"A"})

B: Factors = frozenset({"B"})

AB: Factors = frozenset({"A", "B"})

Array = NDArray[np.float32]
Adapter = dict[str, Array]
Kind = Literal["A", "B", "head", "gate", "fixed"]


_PARTS: tuple[Kind, ...] = ("A", "B", "gate", "fixed")


def sibling(name: str, part: str) -> str:
    """Return the name of another tensor of the same layer: such as its ``A`` or its ``gate``."""
    for own in _PARTS:
        name = name.replace(f".lora_{own}.", f".lora_{part}.")
    return name


def factor_pairs(adapter: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the names (of B, of A) of every adapted layer."""
    for name in adapter:
        if kind(name) == "B":
            yield name, sibling(name, "A")


def truncate_to_rank(adapter: Mapping[str, Array], rank: int, full: int) -> Adapter:
    """Return the first ``rank`` of ``full`` directions, in units of that rank's own scale.

    The scale is α/r, so (α/rank)·B·(rank/full)·A is what these directions add at full rank.
    Limit: ``rank == full`` returns the same arrays.
    """
    if rank == full:
        return dict(adapter)
    cut = dict(adapter)
    for b, a in factor_pairs(adapter):
        cut[b] = adapter[b][:, :rank] * np.float32(rank / full)
        cut[a] = adapter[a][:rank]
    return cut


def rescale_to_full_rank(upload: Mapping[str, Array], rank: int, full: int) -> Adapter:
    """Return a client's factors in units of the scale at ``full`` rank: B times full/rank."""
    if rank == full:
        return dict(upload)
    return {n: x * np.float32(full / rank) if kind(n) == "B" else x for n, x in upload.items()}


def kind(name: str) -> Kind:
    """Tell what a tensor is from its name.

    PEFT's are factor ``A`` (r, n), ``B`` (m, r) and ``head``. A method may add a ``gate``, which
    is trained and sent in every round as the head is, and what is ``fixed`` on the clients.
    """
    for part in _PARTS:
        if f".lora_{part}." in name:
            return part
    return "head"


def active_names(names: Iterable[str], factors: Factors) -> frozenset[str]:
    """Return the names of the given factors, and of head and gates: active in every step."""
    return frozenset(name for name in names if kind(name) in (*factors, "head", "gate"))


def select(adapter: Mapping[str, Array], factors: Factors) -> Adapter:
    """Return the tensors of the given factors and of the head: what a round sends up."""
    names = active_names(adapter, factors)
    return {name: array for name, array in adapter.items() if name in names}


def num_bytes(adapter: Mapping[str, Array]) -> int:
    """Return the bytes of the tensors themselves (4 an entry), without any envelope."""
    return sum(array.nbytes for array in adapter.values())
