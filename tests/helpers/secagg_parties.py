"""One attempt of secure aggregation among real clients and a real session, without a model."""

from collections.abc import Collection, Mapping

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from lalora_app.secagg.client import STAGES
from lalora_app.secagg.messages import MASKED, SECAGG
from lalora_app.secagg.session import Session
from lalora_app.secagg.upload import OpenAttempt, open_attempt
from lalora_app.secagg.waves import Part
from lalora_app.wire.messages import TrainRequest
from lalora_app.wire.tensors import WireError

FIRST_NODE = 100
REQUEST = TrainRequest("run-1", 1, 1, 1, 1, {"A": 0, "B": 0})


def fresh_context() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


def copied(context: Context) -> Context:
    """A context with the same secrets, to try an answer that the client gives once."""
    records = context.state.config_records.items()
    state = RecordDict({name: ConfigRecord(dict(record)) for name, record in records})
    return Context(1, 1, {}, state, {})


class Parties:
    """``clients`` clients, and the server's session with them."""

    def __init__(self, clients: int, colluding: int | None = None):
        nodes = {client: FIRST_NODE + client for client in range(clients)}
        self.session = Session("run-1", 1, nodes, 2, colluding)
        self.contexts = {client: fresh_context() for client in nodes}
        self.open: dict[int, OpenAttempt] = {}

    def ask(self, part: Part, lost: Collection[int] = (), change=lambda client, reply: reply):
        """Ask the clients for a stage; the replies of some are lost, and others are changed."""
        for node, record in part.records.items():
            client = node - FIRST_NODE
            reply = STAGES[part.stage](record, self.contexts[client])
            if client in lost:
                continue
            try:
                part.read(ConfigRecord(change(client, dict(reply))), node)
            except WireError as error:
                part.drop_reasons.append(str(error))

    def set_up(self, lost: Mapping[str, Collection[int]]) -> bool:
        """Run the first two stages, and open the attempt at each client that may train."""
        self.ask(self.session.advertise(), lost["advertise"])
        if not self.session.has_keys():
            return False
        self.ask(self.session.share(), lost["share"])
        return self.open_all()

    def open_all(self) -> bool:
        """Open the attempt at each client that may train; tell whether there are any."""
        for client, fields in self.session.training_fields().items():
            content = RecordDict({SECAGG: ConfigRecord(fields)})
            self.open[client] = open_attempt(content, self.contexts[client], REQUEST)
        return bool(self.open)

    def vectors(self, words: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Mask one vector per client."""
        return {client: self.open[client].masked(words[client])[MASKED] for client in words}

    def unmask(self, masked, lost: Collection[int] = (), change=lambda client, reply: reply):
        """Return the sum of the masked vectors and the revealed seeds."""
        (part,) = self.session.unmask(masked)
        self.ask(part, lost, change)
        return self.session.unmasked_sum(masked), self.session.noise_seeds()
