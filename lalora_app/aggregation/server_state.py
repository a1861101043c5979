"""The state of the server between two rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lalora_app.adapter.factors import Adapter, Factor, Factors


def _no_versions() -> dict[Factor, int]:
    return {"A": 0, "B": 0}


@dataclass(frozen=True)
class ServerState:
    """What the server knows after ``round`` successful aggregations.

    Attributes:
        adapter: the global adapter: both factors, the head, and what a method adds.
        round: successful aggregations so far; round ``t = round + 1`` comes next.
        versions: how often each factor has been aggregated; a client's resident factor is valid
            while the version it was downloaded at is still the current one.
        attempts: rounds asked of the clients, the failed ones included.
        drift: what has moved into the base, ``W = W0 + B·A`` without a scale; any rank.
    """

    adapter: Adapter
    round: int = 0
    versions: Mapping[Factor, int] = field(default_factory=_no_versions)
    attempts: int = 0
    drift: Adapter = field(default_factory=dict)

    def advanced(
        self, adapter: Adapter, synced: Factors, drift: Adapter | None = None
    ) -> "ServerState":
        """Return the state after a successful aggregation of ``synced``."""
        versions: dict[Factor, int] = {f: n + (f in synced) for f, n in self.versions.items()}
        moved = self.drift if drift is None else drift
        return ServerState(adapter, self.round + 1, versions, self.attempts + 1, moved)

    def failed(self) -> "ServerState":
        """Return the state after an attempt that aggregated nothing: the phase stays."""
        return replace(self, attempts=self.attempts + 1)
