"""The ClientApp: one message in, one reply out. It owns the refusal and sanitises every error."""

import logging
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lalora_app import backbone, residents, trainer, wire
from lalora_app.adapter import Adapter, select
from lalora_app.config import Config, ConfigError, parse
from lalora_app.data import Examples, check_client
from lalora_app.data import private_file as read_private_file
from lalora_app.encoding import Encoded
from lalora_app.methods import checked_rank, method_of
from lalora_app.partition import CLIENT_NAME, deal_name, partition
from lalora_app.privacy import randomness
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.ledger import BudgetError, Ledger, Limit, Reservation, noise_for
from lalora_app.privacy.policy import Policy, read_policy, state_folder
from lalora_app.secagg import client as secagg
from lalora_app.secagg.fixed_point import RangeError
from lalora_app.secagg.records import StageError
from lalora_app.sources import DataError

app = ClientApp()
_log = logging.getLogger("flwr")


Prepared = tuple["LocalData", backbone.Backbone, Adapter, Encoded]


@dataclass(frozen=True)
class LocalData:
    """A client's examples, its name, and the name under which the ledger knows the dataset."""

    client: str
    dataset: str
    examples: Examples


def _simulated(config: Config, index: int, clients: int) -> LocalData:
    data = config.data
    deal = deal_name(data, config.seed)
    return LocalData(
        client=CLIENT_NAME.format(index),
        dataset=f"simulated {data.name} {deal} {index}/{clients}",
        examples=partition(data, config.seed, clients)[index],
    )


def _local_data(config: Config, context: Context) -> LocalData:
    """Find this node's data: its own file, or its part of a simulated deal (Flower Hub's rule)."""
    node = context.node_config
    if "data-path" in node:
        path = str(node["data-path"])
        dataset = str(node.get("dataset-id", f"file {Path(path).expanduser().resolve()}"))
        name = str(node.get("name", f"node-{context.node_id}"))
        return LocalData(name, dataset, read_private_file(path, config.data))
    if "partition-id" in node and "num-partitions" in node:
        return _simulated(config, int(node["partition-id"]), int(node["num-partitions"]))
    raise ConfigError("node config must have data-path, or partition-id and num-partitions")


def _checked_data(config: Config, context: Context) -> LocalData:
    local = _local_data(config, context)
    batch_size, delta = config.train.batch_size, config.privacy.delta
    check_client(len(local.examples), batch_size=batch_size, delta=delta)
    return local


def _rank(config: Config, context: Context) -> int:
    """Return this client's rank: its node's own, or its turn in ``lora.ranks``."""
    turn = [config.lora.rank]
    if config.lora.ranks != "none":
        turn = [int(rank) for rank in config.lora.ranks.split(",")]
    index = int(context.node_config.get("partition-id", 0))
    return checked_rank(context.node_config.get("rank", turn[index % len(turn)]), config)


def _prepared(config: Config, context: Context) -> Prepared:
    """Return everything that can fail for a reason of ours: before any budget is spent."""
    local = _checked_data(config, context)
    rank = _rank(config, context)
    model, start = backbone.build(replace(config, lora=replace(config.lora, rank=rank)))
    return local, model, start, model.encode(local.examples)


def _streams(config: Config, local: LocalData, attempt: int) -> trainer.Streams:
    if config.privacy.noise == "secure":
        return trainer.Streams(randomness.secure(), randomness.secure())
    seed, who = config.seed, local.client
    return trainer.Streams(
        randomness.seeded(seed, "sampling", who, attempt),
        randomness.seeded(seed, "noise", who, attempt),
    )


def _policy(config: Config, context: Context) -> Policy:
    """Return the node's policy, which no noise that the server can repeat may count under."""
    policy = read_policy(context.node_config, config.privacy.delta, config.data.public_size)
    if math.isfinite(policy.limit.epsilon) and config.privacy.noise != "secure":
        raise ConfigError(
            f'privacy.noise="{config.privacy.noise}" must be "secure" for a node with '
            f"max-epsilon={policy.limit.epsilon}"
        )
    return policy


def _reserve(
    config: Config, local: LocalData, context: Context, request: wire.TrainRequest
) -> Reservation:
    """Fix the noise, ask the limits, and commit the round's releases to the ledger."""
    privacy, steps = config.privacy, config.train.local_steps
    ledger = Ledger(state_folder(context.node_config) / "ledger.sqlite")
    policy = _policy(config, context)
    limit = Limit(privacy.epsilon, privacy.delta)
    q = config.train.batch_size / len(local.examples)
    past = ledger.releases(local.dataset, request.run)
    left = max(request.steps_left, steps)
    noise_multiplier = noise_for(past, limit, sampling_rate=q, steps=left)
    return ledger.reserve(
        local.dataset,
        request.run,
        request.round,
        Release(q, noise_multiplier, steps),
        planned=left,
        run_limit=limit,
        node_limit=policy.limit,
    )


def _spent(config: Config, local: LocalData, context: Context, run: str) -> float:
    ledger = Ledger(state_folder(context.node_config) / "ledger.sqlite")
    spent = epsilon(ledger.releases(local.dataset, run), config.privacy.delta)
    return spent if math.isinf(spent) else math.ceil(spent * 100) / 100


def _config(message: Message, context: Context) -> Config:
    """Return the config of the run that the message belongs to."""
    return parse({**context.run_config, **wire.run_config_of(message.content)})


def _hello(message: Message, context: Context) -> RecordDict:
    config = _config(message, context)
    _policy(config, context)
    return wire.Hello(_prepared(config, context)[0].client, _rank(config, context)).record()


def _train(message: Message, context: Context) -> RecordDict:
    config = _config(message, context)
    method = method_of(config)
    request = wire.parse_request(message.content)
    local, model, like, encoded = _prepared(config, context)
    policy = _policy(config, context)
    start = received = wire.adapter_of(message.content, like)
    drift = wire.drift_of(message.content, like)
    folder = state_folder(context.node_config)
    resident = residents.resident_file(folder, local.dataset, request.run)
    start = residents.substitute(resident, start, request.versions, request.attempt)

    # Out of order, a stage of secure aggregation is refused here, before anything is spent.
    seal = secagg.SEALS[config.secure_aggregation](message.content, context, request)

    clock = [time.monotonic()]
    reservation = _reserve(config, local, context, request)
    clock.append(time.monotonic())
    result = trainer.run_round(
        model,
        encoded,
        start,
        drift,
        local=trainer.Local(
            method,
            request.round,
            config.num_server_rounds,
            config.train,
            config.rule,
            config.privacy.clip_norm,
            randomness.seed_of(config.seed, local.client, request.attempt),
        ),
        reservation=reservation,
        streams=_streams(config, local, request.attempt),
    )
    clock.append(time.monotonic())
    # For benchmarks, in the client's own log: how long a batch takes is a fact of the data.
    if "LALORA_TIMING" in os.environ:
        account, train = (after - before for before, after in pairwise(clock))
        _log.info("LaLoRA timing %d %s %.3f %.3f", request.attempt, local.client, account, train)
    sent = method.sent(request.round, last=config.is_last(request.attempt))
    upload = seal(select(result, sent), select(received, sent))
    waiting = method.resident(request.round, config.train.local_steps)
    last = request.steps_left <= config.train.local_steps
    waiting = frozenset() if last else waiting
    residents.keep(resident, result, waiting, request.versions, request.attempt)
    return wire.TrainReply(
        upload=upload,
        round=request.round,
        epsilon=_spent(config, local, context, request.run),
        num_examples=len(local.examples) if policy.public_size else None,
    ).record()


def _refusal_key(error: Exception) -> str:
    match error:
        case BudgetError():
            return "budget"
        case DataError():
            return error.key
        case ConfigError():
            return "config"
        case StageError():
            return "stage"
        case RangeError():
            return "update"
        case wire.WireError():
            return "request"
    return "internal"


def _answer(
    message: Message, context: Context, handle: Callable[[Message, Context], RecordDict]
) -> Message:
    """Reply with what ``handle`` returns, or with a fixed sentence: exception texts stay here."""
    try:
        content = handle(message, context)
    except Exception as error:  # whatever it is, its text may hold private data
        _log.error("LaLoRA client: %s: %s", type(error).__name__, error)
        _log.debug("%s", traceback.format_exc())
        content = wire.refusal(_refusal_key(error))
    return Message(content, reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say this client's name, after checking that its data can take part. Spends nothing."""
    return _answer(message, context, _hello)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round under the client's own ledger and policy, or refuse."""
    return _answer(message, context, _train)


@app.train("advertise")
def advertise(message: Message, context: Context) -> Message:
    """Begin an attempt under secure aggregation with fresh keys. Spends nothing."""
    return _answer(message, context, secagg.advertise)


@app.train("share")
def share(message: Message, context: Context) -> Message:
    """Share the secrets of this attempt's masks among its clients. Spends nothing."""
    return _answer(message, context, secagg.share)


@app.train("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Help to take the masks off the sum, if enough of it is there. Spends nothing."""
    return _answer(message, context, secagg.unmask)
