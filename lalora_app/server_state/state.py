"""The state of the server between two rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lalora_app.adapter.factors import FACTORS, Adapter, Factor, Factors, kind


def _no_versions() -> dict[Factor, int]:
    return dict.fromkeys(FACTORS, 0)


@dataclass(frozen=True)
class ServerState:
    """The server's state after ``round`` successful aggregations.

    Attributes:
        adapter: the global adapter: both factors, the head and the method's extra tensors.
        round: number of successful aggregations so far; the next round is ``t = round + 1``.
        versions: number of aggregations per factor. A client's own copy of a factor is valid as
            long as this number has not changed since its download.
        attempts: number of rounds that were requested from clients, including failed ones.
        drift: change of the base weights since the start, ``W = W0 + B·A`` without a scale, of
            any rank.
        first_moment: the first moments of ``server.optimizer``, by name of the tensor; a tensor
            that was never stepped has none.
        second_moment: its second moments, of Adam and Yogi only.
        average: the running average of ``server.average``: plain means of the head, and factors
            whose product is the mean of the products, of any rank. Empty before its first round.
        averaged: number of adapters in ``average``.
        memory: tensors that the method's rule keeps at the server between two rounds.
        ranks: client, by its place in the order of names -> its rank, if the method has lowered it.
    """

    adapter: Adapter
    round: int = 0
    versions: Mapping[Factor, int] = field(default_factory=_no_versions)
    attempts: int = 0
    drift: Adapter = field(default_factory=dict)
    first_moment: Adapter = field(default_factory=dict)
    second_moment: Adapter = field(default_factory=dict)
    average: Adapter = field(default_factory=dict)
    averaged: int = 0
    memory: Adapter = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)

    def aggregations(self, name: str) -> int:
        """Return how many aggregations have changed a tensor so far; heads travel every round."""
        part = kind(name)
        return self.versions[part] if part in FACTORS else self.round

    def advanced(
        self, adapter: Adapter, synced: Factors, drift: Adapter | None = None
    ) -> "ServerState":
        """Return the state after a successful aggregation.

        Args:
            adapter: the new global adapter.
            synced: the factors that clients uploaded in this round.
            drift: the new drift of the base; None keeps the present one.
        """
        versions: dict[Factor, int] = {f: n + (f in synced) for f, n in self.versions.items()}
        moved = self.drift if drift is None else drift
        return replace(
            self,
            adapter=adapter,
            round=self.round + 1,
            versions=versions,
            attempts=self.attempts + 1,
            drift=moved,
        )

    def failed(self) -> "ServerState":
        """Return the state after a failed attempt: only ``attempts`` grows."""
        return replace(self, attempts=self.attempts + 1)
