"""The Strategy under secure aggregation: the server learns only the sum of the uploads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from lalora_app.adapter.factors import Adapter, Factors, select
from lalora_app.secagg import fixed_point
from lalora_app.secagg.messages import KEYS_MESSAGE, MASKED, SECAGG
from lalora_app.secagg.pipeline import Pipeline
from lalora_app.secagg.session import Session
from lalora_app.secagg.waves import Part, add_parts, exchange
from lalora_app.server.strategy import FederatedLora
from lalora_app.shared_noise.lattice import Words
from lalora_app.wire.messages import TrainReply
from lalora_app.wire.tensors import WireError


@dataclass
class SecureFederatedLora(FederatedLora):
    """Runs a method's rounds on sums: keys and shares travel with the requests of earlier rounds.

    The server cannot check single uploads, so the client checks that its tensors are finite. The
    aggregation error and the cosine of updates are not known.
    """

    _pipeline: Pipeline = field(init=False)
    _grid: Grid = field(init=False)
    _session: Session = field(init=False)
    _later: list[Part] = field(default_factory=list)
    _training: dict[int, int] = field(default_factory=dict)
    _mean: Adapter = field(default_factory=dict)

    def __post_init__(self) -> None:
        nodes, config = self.clients.nodes, self.config
        cohorts = [{client: nodes[client] for client in c} for c in self.clients.cohorts]
        limits = config.min_replies, config.round_timeout
        self._pipeline = Pipeline(self.run, cohorts, *limits, **self._terms())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return requests to the clients that shared their secrets, and the next attempt's stages.

        Returns no messages if fewer than ``min-replies`` clients shared their secrets.
        """
        requests = list(super().configure_train(server_round, arrays, config, grid))
        cohort, attempt, self._grid = super()._asked(), self.state.attempts + 1, grid
        self._session = self._pipeline.begin(attempt, grid)
        shares = self._session.training_fields()
        self._training = {node: client for node, client in cohort.items() if client in shares}
        self._later = self._pipeline.with_training(attempt) if shares else []
        asked = [r for r in requests if r.metadata.dst_node_id in self._training]
        for request in asked:
            client = self._training[request.metadata.dst_node_id]
            request.content[SECAGG] = ConfigRecord(shares[client])
        return add_parts(self._later, attempt, asked)

    def _terms(self) -> dict[str, Any]:
        """Return what the protocol of shared noise needs; nothing for own noise."""
        return {}

    def _asked(self) -> dict[int, int]:
        return self._training

    def _expected(self, client: int) -> Mapping[str, np.ndarray]:
        size = sum(array.size for array in super()._expected(client).values())
        return {MASKED: np.zeros(size, np.uint32)}

    def _judge(self, replies: Iterable[Message]) -> tuple[dict[int, TrainReply], list[str]]:
        """Read the next attempt's shares, and judge the replies to training requests."""
        replies = list(replies)
        for part in self._later:
            part.read_replies(replies)
        trained = [r for r in replies if r.metadata.message_type != KEYS_MESSAGE]
        accepted, dropped = super()._judge(trained)
        self._session.drop_reasons.extend(dropped)
        return accepted, self._session.drop_reasons

    def _enough(self, accepted: dict[int, TrainReply], dropped: list[str]) -> bool:
        """Unmask the sum if there are enough replies; otherwise leave all masks on.

        Keys of a later attempt travel in the same wave, and also if there is nothing to unmask.
        """
        vectors = {self._training[node]: r.upload[MASKED] for node, r in accepted.items()}
        unmask = self._session.unmask(vectors) if super()._enough(accepted, dropped) else []
        attempt = self.state.attempts + 1
        later = self._pipeline.with_unmasking(attempt)
        exchange([*unmask, *later], attempt, self._grid, self.config.round_timeout)
        try:
            self._mean = self._unmasked(vectors) if unmask else {}
        except WireError as error:
            dropped.append(str(error))
            return False
        return bool(unmask)

    def _unmasked(self, vectors: Mapping[int, Words]) -> Adapter:
        """Return the mean of the clients' tensors."""
        total = self._session.unmasked_sum(vectors)
        mean = fixed_point.dequantised_mean(total, len(self._session.mask_keys), len(vectors))
        return fixed_point.add_update(select(self.state.adapter, self._synced()), mean)

    def _uploads(self, accepted: dict[int, TrainReply]) -> tuple[list[float], list[Adapter]]:
        return [1.0], [self._mean]

    def _complete(self, t: int, synced: Factors) -> bool:
        return False
