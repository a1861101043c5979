"""An adapter as a flat mapping from PEFT's tensor names to arrays, and what travels of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lalora_app.schedule import Factor, Factors

Array = NDArray[np.float32]
Adapter = dict[str, Array]
Kind = Literal["A", "B", "head"]


def kind(name: str) -> Kind:
    """Tell what a tensor is from its PEFT name: factor ``A`` (r, n), ``B`` (m, r), or ``head``."""
    if ".lora_A." in name:
        return "A"
    return "B" if ".lora_B." in name else "head"


def active_names(names: Iterable[str], factors: Factors) -> frozenset[str]:
    """Return the names of the given factors and of the head, which is active in every step."""
    return frozenset(name for name in names if kind(name) in factors or kind(name) == "head")


def select(adapter: Mapping[str, Array], factors: Factors) -> Adapter:
    """Return the tensors of the given factors and of the head: what a round sends up."""
    names = active_names(adapter, factors)
    return {name: array for name, array in adapter.items() if name in names}


def num_bytes(adapter: Mapping[str, Array]) -> int:
    """Return the bytes of the tensors themselves (4 an entry), without any envelope."""
    return sum(array.nbytes for array in adapter.values())


def _no_versions() -> dict[Factor, int]:
    return {"A": 0, "B": 0}


@dataclass(frozen=True)
class ServerState:
    """What the server knows after ``round`` successful aggregations.

    Attributes:
        adapter: the global adapter: both factors and the head.
        round: successful aggregations so far; round ``t = round + 1`` comes next.
        versions: how often each factor has been aggregated; a client's resident factor is valid
            while the version it was downloaded at is still the current one.
        attempts: rounds asked of the clients, the failed ones included.
    """

    adapter: Adapter
    round: int = 0
    versions: Mapping[Factor, int] = field(default_factory=_no_versions)
    attempts: int = 0

    def advanced(self, adapter: Adapter, synced: Factors) -> "ServerState":
        """Return the state after a successful aggregation of ``synced``."""
        versions: dict[Factor, int] = {f: n + (f in synced) for f, n in self.versions.items()}
        return ServerState(adapter, self.round + 1, versions, self.attempts + 1)

    def failed(self) -> "ServerState":
        """Return the state after an attempt that aggregated nothing: the phase stays."""
        return ServerState(self.adapter, self.round, self.versions, self.attempts + 1)
