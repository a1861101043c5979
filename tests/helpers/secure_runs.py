"""Runs under secure aggregation, with four clients."""

from lalora_app.adapter.factors import select
from lalora_app.methods.table import METHODS

CLIENTS, ON = 4, {"secure-aggregation": "secagg+"}
STAGES = ("train.advertise", "train.share", "train", "train.unmask")


def lose(stage, attempt, *partitions):
    """Lose the replies of some clients at one stage of one attempt."""

    def fault(now, partition, reply):
        lost = (now, reply.metadata.message_type) == (attempt, stage) and partition in partitions
        return None if lost else reply

    return fault


def uploads(done, rounds, attempt):
    """What each client would have sent without secure aggregation, by partition."""
    method, found = METHODS[done.config.method], {}
    for exchange, local in zip(done.grid.trained(), rounds, strict=True):
        if exchange.attempt == attempt:
            sent = method.sent(local.t, last=done.config.is_last(attempt))
            found[exchange.partition] = select(local.result, sent)
    return found


def states(done):
    """The global adapter before each attempt, and the last one."""
    attempts = range(1, done.config.num_server_rounds + 1)
    known = [exchange.start for attempt in attempts for exchange in done.grid.trained(attempt)[:1]]
    return [*known, done.folder.latest().adapter]


def done_state(done, attempt):
    return states(done)[attempt]
