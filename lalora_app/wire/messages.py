"""Messages between server and clients: record names, requests, replies, and their checks."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from lalora_app.adapter.factors import Adapter, Factor, factor_pairs, kind
from lalora_app.settings.run_config import Config, Scalar, flatten
from lalora_app.wire.code_version import code_hash
from lalora_app.wire.refusals import REFUSALS, RefusedError
from lalora_app.wire.same_model import MODEL, model_of, model_record
from lalora_app.wire.tensors import WireError, from_record, to_record

ARRAYS, CONFIG, METRICS, RUN_CONFIG = "arrays", "config", "metrics", "run"
DRIFT = "drift"  # the change of the frozen weights since the run began
KEPT: tuple[Factor, ...] = ("A", "B")  # factors that a client may keep for a later round
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def adapter_of(content: RecordDict, like: Mapping[str, np.ndarray]) -> Adapter:
    """Unpack the adapter of a request or a reply, see :func:`from_record`."""
    return from_record(content.array_records.get(ARRAYS, ArrayRecord()), like)


def rank_of(content: RecordDict, largest: int) -> int:
    """Return the rank of a request's factors, for a method that lowers a client's rank.

    Limit: without a readable A it is ``largest``, and :func:`adapter_of` then names the fault.

    Args:
        content: the request's records.
        largest: the client's rank at the start of the run.

    Raises:
        WireError: if the rank is not from 1 to ``largest``.
    """
    record = content.array_records.get(ARRAYS, ArrayRecord())
    shapes = [array.shape for name, array in record.items() if kind(name) == "A"]
    rank = shapes[0][0] if shapes and len(shapes[0]) == 2 else largest
    if not 1 <= rank <= largest:
        raise WireError(f"the request's factors have rank {rank}, which must be 1 to {largest}")
    return rank


def drift_of(content: RecordDict, like: Mapping[str, np.ndarray]) -> Adapter:
    """Unpack the drift of a request: nothing, or both factors of every layer, of any fitting rank.

    Args:
        content: the request's records.
        like: the client's own adapter, for names and widths.

    Raises:
        WireError: naming the first tensor that does not fit.
    """
    record = content.array_records.get(DRIFT, ArrayRecord())
    if not record:
        return {}
    shapes: dict[str, np.ndarray] = {}
    for b, a in factor_pairs(like):
        rank = record[a].shape[0] if a in record and len(record[a].shape) == 2 else 1
        largest = min(like[b].shape[0], like[a].shape[1])
        if not 1 <= rank <= largest:
            raise WireError(f"the drift's {a} has rank {rank}, which must be 1 to {largest}")
        shapes[b] = np.broadcast_to(np.float32(0), (like[b].shape[0], rank))
        shapes[a] = np.broadcast_to(np.float32(0), (rank, like[a].shape[1]))
    return from_record(record, shapes)


@dataclass(frozen=True)
class TrainRequest:
    """One round's order to one client.

    Attributes:
        run: the run's name, the same after a resume; the ledger groups releases by it.
        round: t, from 1, the number of successful aggregations plus one; it sets the phase.
        attempt: the number of requested rounds, with this one; it seeds repeatable runs.
        steps_left: the local steps planned for this client until the end of the run.
        task_steps_left: the same until the end of the open task; without tasks of the run.
        versions: the number of aggregations of each factor that a client may keep.
    """

    run: str
    round: int
    attempt: int
    steps_left: int
    task_steps_left: int
    versions: Mapping[Factor, int]

    def record(self) -> ConfigRecord:
        """Return the order as a record."""
        numbers = {"round": self.round, "attempt": self.attempt, "steps-left": self.steps_left}
        numbers["task-steps-left"] = self.task_steps_left
        versions = {f"version-{factor}": self.versions[factor] for factor in KEPT}
        return ConfigRecord({"run": self.run, **numbers, **versions})


def count_of(record: ConfigRecord, key: str, smallest: int, largest: float = math.inf) -> int:
    """Read an integer.

    Raises:
        WireError: if it is no integer, or not from ``smallest`` to ``largest``.
    """
    value = record.get(key)
    if type(value) is not int or value < smallest:
        raise WireError(f"{key}={value!r} must be an integer of at least {smallest}")
    if value > largest:
        raise WireError(f"{key}={value!r} must be at most {largest}")
    return value


def parse_request(content: RecordDict, config: Config) -> TrainRequest:
    """Read a server's order, checking every value against the run's own config.

    Raises:
        WireError: if a key is missing, mistyped or out of range.
    """
    record = content.config_records.get(CONFIG, ConfigRecord())
    run = record.get("run")
    if not isinstance(run, str) or not _RUN_NAME.fullmatch(run):
        raise WireError(f"run={run!r} must be a plain name")
    rounds, steps = config.num_server_rounds, config.num_server_rounds * config.train.local_steps
    return TrainRequest(
        run=run,
        round=count_of(record, "round", 1, rounds),
        attempt=count_of(record, "attempt", 1, rounds),
        steps_left=count_of(record, "steps-left", 1, steps),
        task_steps_left=count_of(record, "task-steps-left", 1, steps),
        versions={f: count_of(record, f"version-{f}", 0, rounds) for f in KEPT},
    )


def digest(content: RecordDict, config: Config) -> str:
    """Return a SHA-256 of a whole request, without the server's output folders.

    Args:
        content: the request's records.
        config: the run's config.
    """
    config = replace(config, resume_from="none", output="", compare="none")
    records = (content.config_records.get(name, ConfigRecord()) for name in (CONFIG, MODEL))
    order = [sorted(record.items()) for record in records]
    found = hashlib.sha256(json.dumps([code_hash(), flatten(config), repr(order)]).encode())
    for part in (ARRAYS, DRIFT):
        for name, array in sorted(content.array_records.get(part, ArrayRecord()).items()):
            found.update(f"{part} {name} {array.dtype} {array.shape}\0".encode() + array.data)
    return found.hexdigest()


def refusal(key: str) -> RecordDict:
    """Return a refusal, which holds one key of :data:`REFUSALS` and nothing else."""
    return RecordDict({CONFIG: ConfigRecord({"refusal": key if key in REFUSALS else "internal"})})


@dataclass(frozen=True)
class SiteHello:
    """A client's answer to the query before a run.

    Privacy: nothing of the client's data; the hashes are those of public weights.

    Attributes:
        client: the client's name, the same in every round.
        rank: the rank of its adapter.
        model: the SHA-256 of each part of its base model.
    """

    client: str
    rank: int
    model: Mapping[str, str]

    def record(self) -> RecordDict:
        """Return the answer as records."""
        own = ConfigRecord({"client": self.client, "rank": self.rank, "code": code_hash()})
        return RecordDict({CONFIG: own, MODEL: model_record(self.model)})


@dataclass(frozen=True)
class TrainReply:
    """A client's upload of one round, with the accounting of this run.

    Attributes:
        upload: the synced factors and the head; under secure aggregation one masked vector.
        round: the request's round.
        epsilon: the ε that this client has spent in this run, rounded up to 0.01.
        num_examples: the size of the client's data, if the client has declared it public.
    """

    upload: Mapping[str, np.ndarray]
    round: int
    epsilon: float
    num_examples: int | None = None

    def record(self) -> RecordDict:
        """Return the reply as records."""
        sizes = {} if self.num_examples is None else {"num-examples": self.num_examples}
        metrics = MetricRecord({"round": self.round, "epsilon": self.epsilon, **sizes})
        config = ConfigRecord({"code": code_hash()})
        return RecordDict({ARRAYS: to_record(self.upload), METRICS: metrics, CONFIG: config})


def run_config(values: Mapping[str, Scalar]) -> ConfigRecord:
    """Return the keys and values of a run as a record.

    Each message carries them, because one Flower run may hold many runs of a comparison.
    """
    return ConfigRecord({"run-config": json.dumps(dict(values))})


def run_config_of(content: RecordDict) -> dict[str, object]:
    """Read the run config of a message; empty if the message has none.

    Raises:
        WireError: if it is not a JSON object.
    """
    text = content.config_records.get(RUN_CONFIG, ConfigRecord()).get("run-config", "{}")
    try:
        values = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise WireError("run-config must be JSON") from error
    if not isinstance(values, dict):
        raise WireError("run-config must be a JSON object")
    return values


def content_or_raise(reply: Message) -> RecordDict:
    """Return the content of a reply that carries neither an error nor a refusal.

    Raises:
        WireError: with the error or refusal, or if the client runs other code.
    """
    if reply.has_error():
        law = "the client's process has ended or is not reachable"
        raise WireError(f"error {reply.error.code}: {law}")
    config = reply.content.config_records.get(CONFIG, ConfigRecord())
    if "refusal" in config:
        raise RefusedError(str(config["refusal"]))
    if config.get("code") != code_hash():
        raise WireError("the client runs other code than the server")
    return reply.content


def parse_hello(reply: Message) -> SiteHello:
    """Read a client's reply to the query.

    Raises:
        WireError: if it refuses, failed, or runs other code.
    """
    content = content_or_raise(reply)
    record = content.config_records[CONFIG]
    client = record.get("client")
    if not isinstance(client, str) or not client:
        raise WireError("client must be a name")
    return SiteHello(client, count_of(record, "rank", 1), model_of(content))


def parse_reply(reply: Message, expected: Mapping[str, np.ndarray], t: int) -> TrainReply:
    """Check one client's reply and read it.

    Args:
        reply: the message from Flower.
        expected: the tensors that round ``t`` syncs, for names, shapes and type.
        t: the requested round.

    Raises:
        WireError: with the first fault; the caller drops the reply and goes on.
    """
    content = content_or_raise(reply)
    metrics = content.metric_records.get(METRICS, MetricRecord())
    if metrics.get("round") != t:
        raise WireError(f"round={metrics.get('round')!r} must be {t}: a stale reply")
    spent = metrics.get("epsilon")
    if not isinstance(spent, int | float) or not spent >= 0:
        raise WireError(f"epsilon={spent!r} must be a number of at least 0")
    size = metrics.get("num-examples")
    if size is not None and (type(size) is not int or size < 1):
        raise WireError(f"num-examples={size!r} must be a positive integer")
    upload = adapter_of(content, expected)
    return TrainReply(upload, t, float(spent), size)
