"""The `Adapter` type, the kinds of its tensors, and the selection of tensors to send."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

# W is the change of a whole weight, which full fine-tuning trains in place of A and B.
Factor = Literal["A", "B", "W"]

FACTORS: tuple[Factor, ...] = get_args(Factor)

Factors = frozenset[Factor]

A: Factors = frozenset({"A"})

B: Factors = frozenset({"B"})

AB: Factors = frozenset({"A", "B"})

W: Factors = frozenset({"W"})

NONE: Factors = frozenset()

Array = NDArray[np.float32]
Adapter = dict[str, Array]
Kind = Literal["A", "B", "W", "head", "gate", "fixed", "moment"]


_PARTS: tuple[Kind, ...] = ("A", "B", "W", "gate", "fixed")
# First the kinds whose names may hold the name of another tensor.
_BY_NAME: tuple[Kind, ...] = ("moment", "fixed", "gate", "A", "B", "W")


def factors_text(factors: Factors) -> str:
    """Return the factors as text, such as "A+B"; "head" if no factor trains or travels."""
    return "+".join(sorted(factors)) or "head"


def sibling(name: str, part: str) -> str:
    """Return the name of another tensor of the same layer.

    Args:
        name: the name of a tensor A, B, W, gate or fixed.
        part: the kind of the wanted tensor, such as ``A`` or ``gate``.
    """
    for own in _PARTS:
        name = name.replace(f".lora_{own}.", f".lora_{part}.")
    return name


def factor_pairs(adapter: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the pair (name of B, name of A) of every adapted layer."""
    for name in adapter:
        if kind(name) == "B":
            yield name, sibling(name, "A")


def to_rank(adapter: Mapping[str, Array], rank: int, full: int) -> Adapter:
    """Return the first ``rank`` columns of B and rows of A, rescaled for a client of that rank.

    A model of rank r multiplies B·A by the LoRA scale α/r. B is multiplied by rank/full here, so
    that (α/rank)·(rank/full)·B·A equals the share of these directions in the full product.

    Args:
        adapter: the global adapter, of rank ``full``.
        rank: the client's rank.
        full: the rank of the run, ``lora.rank``.

    Limit: ``rank == full`` returns the same arrays.
    """
    if rank == full:
        return dict(adapter)
    cut = dict(adapter)
    for b, a in factor_pairs(adapter):
        cut[b] = adapter[b][:, :rank] * np.float32(rank / full)
        cut[a] = adapter[a][:rank]
    return cut


def from_rank(upload: Mapping[str, Array], rank: int, full: int) -> Adapter:
    """Return a client's factors for the LoRA scale of the ``full`` rank: B times full/rank.

    Inverse of the rescaling in :func:`to_rank`; shapes stay the client's.
    """
    if rank == full:
        return dict(upload)
    return {n: x * np.float32(full / rank) if kind(n) == "B" else x for n, x in upload.items()}


def kind(name: str) -> Kind:
    """Return the kind of a tensor, read from its name.

    PEFT creates the factors ``A`` (r, n) and ``B`` (m, r) and the ``head``. Full fine-tuning has
    the change ``W`` (m, n) of a weight in place of A and B. A method may add a ``gate``, which is
    trained and sent in every round like the head, a ``fixed`` tensor, which clients receive but do
    not train, and a ``moment`` of the optimiser, which they compute and send together with factors.
    """
    for part in _BY_NAME:
        if f".lora_{part}." in name:
            return part
    return "head"


def active_names(names: Iterable[str], factors: Factors) -> frozenset[str]:
    """Return the names of the given factors and of all heads and gates (active in every step).

    Limit: without a factor, the heads alone. A gate multiplies factors, so it rests with them.
    """
    kinds = (*factors, "head", "gate") if factors else ("head",)
    return frozenset(name for name in names if kind(name) in kinds)


def select(adapter: Mapping[str, Array], factors: Factors) -> Adapter:
    """Return the tensors that a client uploads: the given factors, heads, gates and moments."""
    names = active_names(adapter, factors)
    names |= {name for name in adapter if factors and kind(name) == "moment"}
    return {name: array for name, array in adapter.items() if name in names}


def num_bytes(adapter: Mapping[str, Array]) -> int:
    """Return the size in bytes of the tensors (4 per entry), without message headers."""
    return sum(array.nbytes for array in adapter.values())
