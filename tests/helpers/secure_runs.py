"""Runs under secure aggregation, with four clients."""

from flwr.app import ConfigRecord

from lalora_app.adapter.factors import select
from lalora_app.methods.table import METHODS
from lalora_app.secagg.messages import SECAGG

CLIENTS, ON = 4, {"secure-aggregation": "secagg+"}
STAGES = ("advertise", "share", "train", "unmask")


def stages_of(request):
    """The stages in a request, with the attempt of each."""
    records = request.content.config_records
    found = {name: records[name]["attempt"] for name in STAGES if name in records}
    trains = {"train": int(request.metadata.group_id)} if SECAGG in records else {}
    return found | trains


def lose_wave(kind, attempt, *partitions):
    """Lose the replies of some clients to all messages of one type in one attempt."""

    def fault(now, partition, reply):
        lost = (now, reply.metadata.message_type) == (attempt, kind) and partition in partitions
        return None if lost else reply

    return fault


def changed(stage, attempt, change, *partitions):
    """Change the record of some clients' replies to one stage of one attempt."""

    def fault(now, partition, reply):
        if stages_of(reply.asked).get(stage) == attempt and partition in partitions:
            reply.content[stage] = ConfigRecord(change(dict(reply.content[stage])))
        return reply

    return fault


def lose(stage, attempt, *partitions):
    """Lose the replies of some clients to one stage of one attempt, each time it is asked for.

    A lost training is a lost message, with the next attempt's shares.
    """
    if stage == "train":
        return lose_wave("train", attempt, *partitions)
    return changed(stage, attempt, lambda record: {}, *partitions)


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
