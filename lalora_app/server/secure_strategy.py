"""The Strategy under secure aggregation: the server learns only the sum of the uploads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from lalora_app.adapter.factors import Adapter, Factors, select
from lalora_app.secagg import fixed_point
from lalora_app.secagg.messages import MASKED, SECAGG
from lalora_app.secagg.session import Session
from lalora_app.server.strategy import FederatedLora
from lalora_app.wire.messages import TrainReply
from lalora_app.wire.tensors import WireError


@dataclass
class SecureFederatedLora(FederatedLora):
    """Runs a method's rounds on sums: key exchange before the requests, unmasking afterwards.

    The server cannot check single uploads, so the client checks that its tensors are finite. The
    aggregation error and the cosine of updates are not known.
    """

    _session: Session = field(init=False)
    _training: dict[int, int] = field(default_factory=dict)
    _mean: Adapter = field(default_factory=dict)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Exchange keys with the cohort, and return requests to the clients that shared theirs.

        Returns no requests if fewer than ``min-replies`` clients shared their keys.
        """
        requests = list(super().configure_train(server_round, arrays, config, grid))
        cohort = super()._asked()
        self._session = Session(
            grid=grid,
            timeout=self.config.round_timeout,
            run=self.run,
            attempt=self.state.attempts + 1,
            nodes={client: node for node, client in cohort.items()},
            min_clients=self.config.min_replies,
        )
        shares = self._session.share_secrets()
        self._training = {node: client for node, client in cohort.items() if client in shares}
        asked = [r for r in requests if r.metadata.dst_node_id in self._training]
        for request in asked:
            client = self._training[request.metadata.dst_node_id]
            request.content[SECAGG] = ConfigRecord(shares[client])
        return asked

    def _asked(self) -> dict[int, int]:
        return self._training

    def _expected(self, client: int) -> Mapping[str, np.ndarray]:
        size = sum(array.size for array in super()._expected(client).values())
        return {MASKED: np.zeros(size, np.uint32)}

    def _judge(self, replies: Iterable[Message]) -> tuple[dict[int, TrainReply], list[str]]:
        accepted, dropped = super()._judge(replies)
        self._session.drop_reasons.extend(dropped)
        return accepted, self._session.drop_reasons

    def _enough(self, accepted: dict[int, TrainReply], dropped: list[str]) -> bool:
        """Unmask the sum if there are enough replies; otherwise leave all masks on."""
        if not super()._enough(accepted, dropped):
            return False
        try:
            self._mean = self._unmasked(accepted)
        except WireError as error:
            dropped.append(str(error))
            return False
        return True

    def _unmasked(self, accepted: dict[int, TrainReply]) -> Adapter:
        """Return the mean of the clients' tensors."""
        vectors = {self._training[node]: r.upload[MASKED] for node, r in accepted.items()}
        total = self._session.unmasked_sum(vectors)
        mean = fixed_point.dequantised_mean(total, len(self._session.mask_keys), len(vectors))
        return fixed_point.add_update(select(self.state.adapter, self._synced()), mean)

    def _uploads(self, accepted: dict[int, TrainReply]) -> tuple[list[float], list[Adapter]]:
        return [1.0], [self._mean]

    def _complete(self, t: int, synced: Factors) -> bool:
        return False
