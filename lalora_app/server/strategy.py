"""The Flower Strategy of every method: request the cohort, check each reply, aggregate."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from lalora_app.adapter.closed_rows import with_closed_rows
from lalora_app.adapter.factors import (
    Adapter,
    Factors,
    factors_text,
    from_rank,
    num_bytes,
    select,
    to_rank,
)
from lalora_app.adapter.low_rank import add_to_drift
from lalora_app.aggregation.measured_error import AggregationErrors, aggregation_errors
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.data.task_division import closed_classes
from lalora_app.methods.method import Method
from lalora_app.server.attempt import Attempt, drop_without_size, require_in_cohort, weights_of
from lalora_app.server.cohorts import Clients
from lalora_app.server.robust import robust
from lalora_app.server_state.iterate_average import with_average
from lalora_app.server_state.optimizer_step import server_step
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config, flatten
from lalora_app.wire import messages, tensors
from lalora_app.wire.downlink import Downlink
from lalora_app.wire.messages import TrainReply
from lalora_app.wire.same_model import MODEL, model_record
from lalora_app.wire.tensors import WireError

_log = logging.getLogger("flwr")


@dataclass
class FederatedLora(Strategy):
    """Runs any method of METHODS; no branch here depends on the method.

    Args:
        config: checked config of the run.
        method: the method's entry of METHODS.
        run: name of the run in the clients' ledgers.
        clients: nodes, ranks and planned cohorts.
        state: state to start from: a fresh adapter, or the last checkpoint.
        epsilon_before: largest ε spent in this run before a resume.
    """

    config: Config
    method: Method
    run: str
    clients: Clients
    state: ServerState
    epsilon_before: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    epsilons: dict[int, float] = field(default_factory=dict)
    _reported: dict[int, float] = field(default_factory=dict)
    _asked_at: float = 0.0
    _downlink: Downlink = field(default_factory=Downlink)

    def summary(self) -> None:
        """Log the run's name, method, clients, steps and privacy target."""
        train, privacy = self.config.train, self.config.privacy
        _log.info(
            "LaLoRA %s: %s, %d clients, %d steps of %s, epsilon %s, delta %s",
            self.run,
            self.config.method,
            len(self.clients.nodes),
            train.local_steps,
            train.batch_text,
            privacy.epsilon,
            privacy.delta,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests to this attempt's cohort.

        Flower's round number is not used: it counts from 1 again after a resume.
        """
        self._asked_at = time.monotonic()
        # A list: Flower's grid goes through it twice, and a generator is empty the second time.
        return [self._request(client) for client in self.clients.cohorts[self.state.attempts]]

    def train_request(self, client: int) -> messages.TrainRequest:
        """Return the next attempt's order to a client of its cohort."""
        attempt, t = self.state.attempts + 1, self.state.round + 1
        steps = self.config.train.local_steps
        within = self.config.rounds_of_task(t)
        return messages.TrainRequest(
            run=self.run,
            round=t,
            attempt=attempt,
            steps_left=steps * self.clients.rounds_left(client, attempt),
            task_steps_left=steps * self.clients.rounds_left(client, attempt, within),
            versions=self.state.versions,
        )

    def _request(self, client: int) -> Message:
        request, node = self.train_request(client), self.clients.nodes[client]
        content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
            **self._downlink.records(node, self.download(client), self.state.drift),
            messages.CONFIG: request.record(),
            MODEL: model_record(self.clients.model),
            messages.RUN_CONFIG: messages.run_config(flatten(self.config)),
        }
        return Message(
            RecordDict(content),
            dst_node_id=node,
            message_type="train",
            group_id=str(request.attempt),
        )

    def _rank(self, client: int) -> int:
        own = self.clients.ranks[client] if self.clients.ranks else self.config.lora.rank
        return min(own, self.state.ranks.get(client, own))

    def _next_ranks(self, accepted: dict[int, TrainReply]) -> dict[int, int]:
        """Return the ranks of all clients whose rank the method has lowered, by this round too."""
        rule, asked, lowered = self.method.next_rank, self._asked(), dict(self.state.ranks)
        if rule is None or not self._synced():
            return lowered
        for node, reply in accepted.items():
            client, start = asked[node], self.download(asked[node])
            rank = rule(start, dict(reply.upload), self.config.rule)
            lowered |= {client: rank} if rank < self._rank(client) else {}
        return lowered

    def download(self, client: int) -> Adapter:
        """Return the global adapter at a client's rank."""
        return to_rank(self.state.adapter, self._rank(client), self.config.lora.rank)

    def _synced(self) -> Factors:
        """Return the factors that clients send in the current attempt."""
        last = self.config.is_last(self.state.attempts + 1)
        return self.method.sent(self.state.round + 1, last=last)

    def _asked(self) -> dict[int, int]:
        """Return the clients selected for the round, client index by node, in order of names."""
        return {self.clients.nodes[i]: i for i in self.clients.cohorts[self.state.attempts]}

    def _expected(self, client: int) -> Mapping[str, np.ndarray]:
        """Return tensors with the names, shapes and types that a client's reply must have."""
        return select(self.download(client), self._synced())

    def _judge(self, replies: Iterable[Message]) -> tuple[dict[int, TrainReply], list[str]]:
        """Return the valid replies in the cohort's order, and one reason per dropped reply."""
        t, asked = self.state.round + 1, self._asked()
        expected = {node: self._expected(client) for node, client in asked.items()}
        some = next(iter(expected.values()), {})
        accepted: dict[int, TrainReply] = {}
        dropped: list[str] = []
        answered = set()
        for message in replies:
            node = message.metadata.src_node_id
            answered.add(message.metadata.reply_to_message_id)
            try:
                # Parse first: Flower's own error messages have the server as their source node.
                reply = messages.parse_reply(message, expected.get(node, some), t)
                require_in_cohort(node, expected)
                accepted[node] = reply
            except WireError as error:
                dropped.append(str(error))
        if (missing := len(asked) - len(answered)) > 0:
            dropped.append(f"{missing} did not answer in time")
        # A fixed order, so that float sums do not depend on the order of arrival.
        return {node: accepted[node] for node in asked if node in accepted}, dropped

    def _account(self, accepted: dict[int, TrainReply]) -> None:
        """Update the ε of each selected client.

        A client without a valid reply may have spent its whole ``privacy.epsilon``.
        """
        promise = self.config.privacy.epsilon
        for node, reply in accepted.items():
            self._reported[node] = max(reply.epsilon, self._reported.get(node, 0.0))
        for node in self._asked():
            self.epsilons[node] = self._reported[node] if node in accepted else promise

    def _enough(self, accepted: dict[int, TrainReply], dropped: list[str]) -> bool:
        """Tell whether there are enough valid replies for a round."""
        return len(accepted) >= self.config.min_replies

    def _uploads(self, accepted: dict[int, TrainReply]) -> tuple[list[float], list[Adapter]]:
        """Return the clients' weights and tensors, scaled from each client's rank to lora.rank."""
        asked, full = self._asked(), self.config.lora.rank
        ranks = {node: self._rank(asked[node]) for node in accepted}
        uploads = [from_rank(r.upload, ranks[node], full) for node, r in accepted.items()]
        return weights_of(self.config.weighting, accepted.values()), uploads

    def aggregate_uploads(self, accepted: dict[int, TrainReply]) -> AggregationErrors:
        """Aggregate one round's replies, by node, into the state; return the measured errors."""
        full, config, synced = self.config.lora.rank, self.config, self._synced()
        (weights, uploads), before = self._uploads(accepted), self.state.adapter
        shares, kept = robust(config.robust, config.suspects, weights, uploads)
        info = RoundInfo(
            t=self.state.round + 1,
            rounds=config.num_server_rounds,
            seed=config.seed,
            numbers=config.rule,
            memory=self.state.memory,
        )
        new = self.method.aggregate(before, shares, kept, info)
        errors = aggregation_errors(
            weights, uploads, before, new, complete=self._complete(info.t, synced)
        )
        # else the mean itself, bit for bit; class sums are no update
        if config.server.changes_update and not config.sums_classes(info.t):
            unstepped = int(config.sums_classes(1))
            self.state, stepped = server_step(
                config.server, self.state, shares, kept, unstepped=unstepped
            )
            new = self.method.aggregate(before, [1.0], [stepped], info)
        scale = config.lora.alpha / full
        drift = add_to_drift(self.state.drift, new.fold, scale) if new.fold else None
        ranks = self._next_ranks(accepted)  # of the adapter before this round
        closed = closed_classes(config, config.open_task(info.t))
        state = self.state.advanced(with_closed_rows(before, new.adapter, closed), synced, drift)
        state = replace(state, ranks=ranks, memory=new.memory)
        self.state = with_average(config.server, state, config.num_server_rounds)
        return errors

    def _complete(self, t: int, synced: Factors) -> bool:
        """Tell whether a product travelled, and the server knows all that clients computed with."""
        if not synced:
            return False
        kept = self.method.resident(t, self.config.train.local_steps) - synced
        return not kept and self.method.effective is None and not self.method.keeps_client_state

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the valid replies if there are at least ``min-replies``.

        Otherwise the adapter and the phase stay, and the round is attempted again. A bad reply is
        dropped and logged; it never ends the run.
        """
        accepted, dropped = self._judge(replies)
        self._downlink.answered(accepted)
        self._account(accepted)
        drop_without_size(self.config.weighting, accepted, dropped)
        t, synced, cohort = self.state.round + 1, self._synced(), self._cohort_nodes()
        enough, errors = self._enough(accepted, dropped), AggregationErrors()
        if enough:
            errors = self.aggregate_uploads(accepted)
        else:
            self.state = self.state.failed()
        sizes = [num_bytes(reply.upload) for reply in accepted.values()]
        self.attempts.append(
            Attempt(
                round=t,
                phase=factors_text(synced),
                aggregated=enough,
                replies=len(accepted),
                dropped=tuple(dropped),
                upload_bytes=sum(sizes) // max(len(sizes), 1),
                download_bytes=sum(self._downlink.bytes[n] for n in cohort) // len(cohort),
                epsilon_max=max([self.epsilon_before, *self.epsilons.values()]),
                aggregation_error=errors.averaging,
                aggregation_spectrum=errors.averaging_spectrum,
                remaining_error=errors.remaining,
                remaining_spectrum=errors.remaining_spectrum,
                update_cosine=errors.cosine,
                seconds=time.monotonic() - self._asked_at,
                epsilon_alone=self._epsilon_alone(),
            )
        )
        for reason in dropped:
            _log.warning("LaLoRA round %d: a reply was dropped: %s", t, reason)
        return (tensors.to_record(self.state.adapter), None) if enough else (None, None)

    def _epsilon_alone(self) -> float | None:
        """Return ε of one client's uploads, each opened; None: they have their own noise."""
        return None

    def _cohort_nodes(self) -> list[int]:
        """Return the nodes of the current attempt's cohort."""
        return [self.clients.nodes[i] for i in self.clients.cohorts[self.state.attempts]]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no requests: a client's accuracy would be one more release of private data."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, as no client was asked to evaluate."""
        return None
