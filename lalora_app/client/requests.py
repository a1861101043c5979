"""Answer the server's query and train requests at one site.

Model and data are loaded first, then the ledger reserves the round's releases, and only then the
training draws any noise.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from safetensors import SafetensorError

from lalora_app.adapter.factors import Adapter, select
from lalora_app.client import data_cache, held_download, last_reply, local_round, resident_factors
from lalora_app.client.site import Site, admit
from lalora_app.data.encoding import Encoded
from lalora_app.methods.compatibility import method_of
from lalora_app.models import backbone
from lalora_app.privacy import randomness
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.budget import Limit, noise_for
from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step import step
from lalora_app.secagg import client as secagg
from lalora_app.settings.names import NONE
from lalora_app.settings.run_config import Config, parse
from lalora_app.wire import messages

_log = logging.getLogger("flwr")

Prepared = tuple[backbone.Backbone, Adapter, Encoded]


def _prepared(config: Config, site: Site) -> Prepared:
    """Return everything that can fail for a reason of ours: before any budget is spent."""
    own = replace(config, lora=replace(config.lora, rank=site.rank))
    kept = data_cache.cache_file(site, config)
    old = kept.read() if kept else None
    if old is not None:
        site.require_size(len(old), config)
        return (*backbone.build(own), old)
    examples = site.examples(config)  # before the model: what is wrong with data is said first
    model, start = backbone.build(own)
    encoded = model.encode(examples)
    if kept:
        with _losing_at_most_a_file():
            kept.write(encoded)
    return model, start, encoded


def _streams(config: Config, client: str, attempt: int) -> step.RandomStreams:
    if config.privacy.noise == "secure":
        return step.RandomStreams(randomness.secure(), randomness.secure())
    seed = config.seed
    return step.RandomStreams(
        randomness.seeded(seed, "sampling", client, attempt),
        randomness.seeded(seed, "noise", client, attempt),
    )


def _reserve(config: Config, site: Site, size: int, request: messages.TrainRequest) -> Reservation:
    """Fix the noise, ask the limits, and commit the round's releases to the ledger."""
    privacy, steps, policy = config.privacy, config.train.local_steps, site.policy
    limit = Limit(privacy.epsilon, privacy.delta)
    q = config.train.batch_size / size
    ledger = site.ledger
    past = ledger.releases(site.dataset, request.run)
    left = max(request.steps_left, steps)
    noise_multiplier = noise_for(past, limit, sampling_rate=q, steps=left)
    policy.check_noise(noise_multiplier)
    return ledger.reserve(
        site.dataset,
        request.run,
        request.round,
        Release(q, noise_multiplier, steps),
        planned=left,
        run_limit=limit,
        node_limit=policy.limit,
        max_rounds=policy.max_rounds,
        per_day=policy.max_rounds_per_day,
    )


def _spent(config: Config, site: Site, run: str) -> float:
    spent = epsilon(site.ledger.releases(site.dataset, run), config.privacy.delta)
    return spent if math.isinf(spent) else math.ceil(spent * 100) / 100


def _config(message: Message, context: Context) -> Config:
    """Return the config of the run that the message belongs to; the device is the node's own."""
    node = context.node_config
    own = {"model.device": node["device"]} if "device" in node else {}
    return parse({**context.run_config, **messages.run_config_of(message.content), **own})


def hello(message: Message, context: Context) -> RecordDict:
    """Return the site's name and rank, after checking that its data can take part."""
    config = _config(message, context)
    site = admit(config, context.node_config, context.node_id)
    _prepared(config, site)
    return messages.SiteHello(site.client, site.rank).record()


def _reply(
    config: Config,
    site: Site,
    request: messages.TrainRequest,
    size: int,
    upload: Mapping[str, np.ndarray],
) -> RecordDict:
    return messages.TrainReply(
        upload=upload,
        round=request.round,
        epsilon=_spent(config, site, request.run),
        num_examples=size if site.policy.public_size else None,
    ).record()


@contextmanager
def _losing_at_most_a_file() -> Iterator[None]:
    """Go on where the disk is full: the reply is paid for, and the server's copy will do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        _log.error("LaLoRA client: what waits for the next round is lost: %s", error)


@dataclass(frozen=True)
class _Received:
    """What the server sent, whole, and a digest of all that it asks for."""

    adapter: Adapter
    drift: Adapter
    digest: str


def _received(content: RecordDict, config: Config, like: Adapter, held: Path) -> _Received:
    """Return a request's tensors with those that it left out, which the client holds."""
    whole = held_download.completed(content, held)
    adapter, drift = messages.adapter_of(whole, like), messages.drift_of(whole, like)
    return _Received(adapter, drift, messages.digest(whole, config))


def _hold(path: Path, received: _Received, *, last: bool) -> None:
    """Keep what was sent for the run's next round; after the last one nothing.

    Only once the ledger has counted the round: a file a run that a server makes up would else
    fill the disk at no cost.
    """
    if last:
        path.unlink(missing_ok=True)
    else:
        held_download.save_download(path, received.adapter, received.drift)


def _tell_times(request: messages.TrainRequest, client: str, clock: Sequence[float]) -> None:
    """Log the seconds of accounting and training, for benchmarks and in the client's own log.

    How long a batch takes is a fact of the data.
    """
    if "LALORA_TIMING" in os.environ:
        account, train = (after - before for before, after in pairwise(clock))
        _log.info("LaLoRA timing %d %s %.3f %.3f", request.attempt, client, account, train)


def train(message: Message, context: Context) -> RecordDict:
    """Train one round and return the reply.

    Privacy: the round's releases are on the ledger before the first one is drawn.
    """
    config = _config(message, context)
    method = method_of(config)
    site = admit(config, context.node_config, context.node_id)
    request = messages.parse_request(message.content, config)
    model, like, encoded = _prepared(config, site)
    held = held_download.download_file(site.state, site.dataset, site.client, request.run)
    received = _received(message.content, config, like, held)
    said = last_reply.reply_file(site.state, site.dataset, site.client)
    # Under secure aggregation every answer has masks of its own: sums of one round over different
    # clients would tell them apart.
    plain = config.secure_aggregation == NONE
    old = last_reply.load_if_same_request(said, received.digest) if plain else None
    if old is not None:
        return _reply(config, site, request, len(encoded), old)
    resident = resident_factors.resident_file(site.state, site.dataset, request.run)
    start = resident_factors.with_residents(
        resident, received.adapter, request.versions, request.attempt
    )

    # Out of order, a stage of secure aggregation is refused here, before anything is spent.
    seal = secagg.UPLOAD_ENCODERS[config.secure_aggregation](message.content, context, request)

    clock = [time.monotonic()]
    reservation = _reserve(config, site, len(encoded), request)
    clock.append(time.monotonic())
    result = local_round.run_round(
        model,
        encoded,
        start,
        received.drift,
        local=local_round.Local(
            method,
            request.round,
            config.num_server_rounds,
            config.train,
            config.rule,
            config.privacy.clip_norm,
            randomness.seed_of(config.seed, site.client, request.attempt),
        ),
        reservation=reservation,
        streams=_streams(config, site.client, request.attempt),
    )
    clock.append(time.monotonic())
    _tell_times(request, site.client, clock)
    last = request.steps_left <= config.train.local_steps
    waiting = frozenset() if last else method.resident(request.round, config.train.local_steps)
    sent = method.sent(request.round, last=config.is_last(request.attempt))
    upload = seal(select(result, sent), select(received.adapter, sent))
    with _losing_at_most_a_file():
        resident_factors.save_residents(
            resident, result, waiting, request.versions, request.attempt
        )
        if plain:
            last_reply.save_reply(said, received.digest, dict(upload))
    with _losing_at_most_a_file():
        _hold(held, received, last=last)
    return _reply(config, site, request, len(encoded), upload)
