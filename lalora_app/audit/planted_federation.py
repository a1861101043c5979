"""A federation in one process, with mislabelled examples planted in the data of one client.

Client and server are the app's own: admission, reservation in a ledger, local steps, resident
factors, server rule. Only messages are left out, and with them secure aggregation: the attacker
sees each client's upload.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lalora_app.adapter.factors import Adapter, Kind, active_names, kind, select
from lalora_app.client import limits, requests
from lalora_app.client.received_round import Received, Round
from lalora_app.client.site import Site, admit
from lalora_app.data.encoding import Batch, Encoded, Indices
from lalora_app.data.examples import Examples, split
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.step import RandomStreams
from lalora_app.server.cohorts import Clients, planned_cohorts
from lalora_app.server.initial_state import initial_state
from lalora_app.server.strategy import FederatedLora
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config
from lalora_app.wire.messages import TrainReply

VICTIM = 0  # index of the client with the canaries
_RUN = "audit"


@dataclass(frozen=True)
class PlantedData(Encoded):
    """A client's examples and canaries, in which absent canaries are empty records.

    Attributes:
        inner: all examples and canaries.
        absent: indices of the absent canaries.
        drawn: the indices in every batch so far, for a check of the attack.
    """

    inner: Encoded
    absent: frozenset[int] = frozenset()
    drawn: list[frozenset[int]] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of records, the empty ones included."""
        return len(self.inner)

    def length(self, index: int) -> int:
        """Return the length by which batches are sorted."""
        return self.inner.length(index)

    def width(self, index: int) -> int:
        """Return the width that an example shares with its whole micro-batch."""
        return self.inner.width(index)

    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given examples."""
        return self.inner.batch(indices, width)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[Batch]:
        """Yield the given examples; an absent canary adds nothing to a sum."""
        present = [index for index in indices if index not in self.absent]
        self.drawn.append(frozenset(present))
        yield from self.inner.micro_batches(present, size)


@dataclass(frozen=True)
class VictimRound:
    """The victim's part in one round.

    Attributes:
        t: the round, from 1.
        received: the global adapter, as the victim received it.
        drift: the change of the frozen weights since the run began.
        change: the victim's result minus ``received``, for all of its tensors.
        sent: the kinds of tensor that travelled to the server.
        steps: by kind, the victim's steps in ``change``, as indices of its batches; a factor that
            waited has steps of earlier rounds too.
        reservation: sampling rate and noise multiplier of the round's steps.
    """

    t: int
    received: Adapter
    drift: Adapter
    change: Adapter
    sent: frozenset[Kind]
    steps: Mapping[Kind, list[int]]
    reservation: Reservation


def mislabelled(config: Config, count: int) -> Examples:
    """Return at most ``count`` public test examples, each with a wrong label."""
    test = split(config.data)[1]
    test = test.take(range(min(count, len(test))))
    wrong = tuple((label + 1) % config.data.num_labels for label in test.labels)
    return Examples(test.contents, wrong)


@dataclass(frozen=True)
class PlantedClient:
    """A simulated client: its site, its model at the site's rank, and its data."""

    site: Site
    model: Backbone
    data: PlantedData


def _joined(own: Examples, more: Examples) -> Examples:
    return Examples(own.contents + more.contents, own.labels + more.labels)


class Federation:
    """The rounds of a run on simulated clients, one of them with canaries.

    Args:
        config: the run's config.
        canaries: examples that are appended to the victim's own.
        members: (canaries,) bool, whether each canary is in the victim's data.
        clients: number of clients.
        seed: seed of batches and noise; it may be known, because the result is thrown away.
        folder: folder of the ledger and of the resident factors.
    """

    def __init__(
        self,
        config: Config,
        canaries: Examples,
        members: np.ndarray,
        clients: int,
        seed: int,
        folder: Path,
    ):
        self.config, self.method, self.seed = config, method_of(config), seed
        self.backbone, start = build(config)
        public = self.backbone.encode(split(config.data)[1])
        node = {"num-partitions": clients, "state-path": str(folder)}
        sites = [admit(config, node | {"partition-id": i}, i) for i in range(clients)]
        self.clients = [self._client(i, site, canaries, members) for i, site in enumerate(sites)]
        ranks = [site.rank for site in sites]
        plan = Clients(range(clients), planned_cohorts(config, clients), ranks=ranks)
        state = initial_state(config, self.backbone, public, start)
        self._server = FederatedLora(config, self.method, _RUN, plan, state)
        self._steps: dict[Kind, list[int]] = {}

    def _client(
        self, index: int, site: Site, canaries: Examples, members: np.ndarray
    ) -> PlantedClient:
        model, own = build(site.config_at_rank(self.config))[0], site.examples(self.config)
        if index != VICTIM:
            return PlantedClient(site, model, PlantedData(model.encode(own)))
        absent = frozenset((len(own) + np.flatnonzero(~members)).tolist())
        return PlantedClient(site, model, PlantedData(model.encode(_joined(own, canaries)), absent))

    @property
    def state(self) -> ServerState:
        """The server's state."""
        return self._server.state

    @property
    def victim(self) -> PlantedClient:
        """The client with the canaries."""
        return self.clients[VICTIM]

    @property
    def epsilon(self) -> float:
        """The victim's ε of the rounds so far, by its ledger."""
        site = self.victim.site
        return epsilon(site.ledger.releases(site.dataset, _RUN), self.config.privacy.delta)

    def drawn(self, steps: Iterable[int]) -> frozenset[int]:
        """Return the victim's records in the batches of the given steps."""
        batches = self.victim.data.drawn
        return frozenset().union(*(batches[step] for step in steps))

    def streams(self, index: int, attempt: int) -> RandomStreams:
        """Return the random streams of one client's round."""
        return RandomStreams(
            seeded(self.seed, "audit sampling", index, attempt),
            seeded(self.seed, "audit noise", index, attempt),
        )

    def rounds(self) -> Iterator[VictimRound]:
        """Run all rounds; yield the victim's part of each round in which it takes part."""
        for cohort in self._server.clients.cohorts:
            victim: list[VictimRound] = []
            replies = {index: self._reply(index, victim) for index in cohort}
            self._server.aggregate_uploads(replies)
            yield from victim

    def _reply(self, index: int, victim: list[VictimRound]) -> TrainReply:
        """Train one client; append the victim's part to ``victim``."""
        client, server = self.clients[index], self._server
        current = Round(
            self.config,
            self.method,
            client.site,
            server.train_request(index),
            client.model,
            client.data,
            Received(server.download(index), self.state.drift, digest=""),
        )
        start, before = current.start(), len(client.data.drawn)
        reservation = limits.reserve(self.config, client.site, current.request, len(client.data))
        streams = self.streams(index, current.request.attempt)
        result = requests.run_local_steps(current, start, reservation, streams)
        current.save_residents(result)
        if index == VICTIM:
            victim.append(self._observed(current, start, result, before, reservation))
        upload = select(result, current.sent)
        return TrainReply(upload, current.request.round, 0.0, len(client.data))

    def _observed(
        self, current: Round, start: Adapter, result: Adapter, before: int, reservation: Reservation
    ) -> VictimRound:
        """Return the victim's part in a round whose first batch has the index ``before``."""
        received, t = current.received.adapter, current.request.round
        changed = {kind(n) for n in received if start[n].tobytes() != received[n].tobytes()}
        waited = {which: self._steps.get(which, []) for which in changed}
        self._steps = {
            which: waited.get(which, []) + self._trained_in(t, which, before)
            for which in dict.fromkeys(kind(name) for name in result)
        }
        return VictimRound(
            t,
            received,
            current.received.drift,
            {name: result[name] - received[name] for name in result},
            frozenset(kind(name) for name in select(result, current.sent)),
            self._steps,
            reservation,
        )

    def _trained_in(self, t: int, which: Kind, before: int) -> list[int]:
        """Return the steps of round ``t`` that train a kind of tensor."""
        trains, names = self.method.trains, self.state.adapter
        return [
            before + k
            for k in range(self.config.train.local_steps)
            if which in {kind(name) for name in active_names(names, trains(t, k))}
        ]
