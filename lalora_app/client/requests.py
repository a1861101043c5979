"""Answer the server's query and train requests at one site.

Model and data are loaded first, then the ledger reserves the round's releases, and only then the
training draws any noise.
"""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from flwr.app import Context, Message, RecordDict

from lalora_app.adapter.factors import Adapter, select
from lalora_app.client import data_cache, local_round, prefix_cache
from lalora_app.client.received_round import Round, download_file, ignoring_disk_errors, receive
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
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, parse
from lalora_app.settings.value_rules import DEVICE_LAW, is_device
from lalora_app.wire import messages
from lalora_app.wire.same_model import check_same_model, model_of

_log = logging.getLogger("flwr")

Loaded = tuple[backbone.Backbone, Adapter, Encoded]


def _load(config: Config, site: Site) -> Loaded:
    """Return the model, its initial adapter and the examples that its training takes."""
    model, start, encoded = _model_and_data(config, site)
    return model, start, prefix_cache.with_states(model, encoded, site)


def _model_and_data(config: Config, site: Site) -> Loaded:
    """Return the model, its initial adapter and the encoded examples.

    Loading can fail on this side, and a failure here must not cost privacy budget.
    """
    own = site.config_at_rank(config)
    cache = data_cache.cache_file(site, config)
    cached = cache.read() if cache else None
    if cached is not None:
        site.require_size(len(cached), config)
        return (*backbone.build(own), cached)
    examples = site.examples(config)  # before the model: errors of the data are reported first
    model, start = backbone.build(own)
    encoded = model.encode(examples)
    if cache:
        with ignoring_disk_errors():
            cache.write(encoded)
    return model, start, encoded


def _run_config(message: Message, context: Context) -> Config:
    """Return the config of the message's run, with the node's own device if it has one."""
    node = context.node_config
    if "device" in node and not is_device(node["device"]):
        raise ConfigError(f"node config device={node['device']!r} {DEVICE_LAW}")
    own = {"model.device": node["device"]} if "device" in node else {}
    return parse({**context.run_config, **messages.run_config_of(message.content), **own})


def hello(message: Message, context: Context) -> RecordDict:
    """Return the site's name, rank and base model, after checking that its data can take part.

    Privacy: nothing is released; the hashes are those of public weights.
    """
    config = _run_config(message, context)
    site = admit(config, context.node_config, context.node_id)
    model = _load(config, site)[0]
    return messages.SiteHello(site.client, site.rank, model.fingerprint).record()


def _prepare(message: Message, context: Context) -> Round:
    """Check a train request and load everything that it needs; nothing is spent."""
    config = _run_config(message, context)
    method = method_of(config)
    site = admit(config, context.node_config, context.node_id)
    request = messages.parse_request(message.content, config)
    model, like, data = _load(config, site)
    check_same_model(site.client, model.fingerprint, model_of(message.content))
    received = receive(message.content, config, like, download_file(site, request))
    return Round(config, method, site, request, model, data, received)


def reserve(current: Round) -> Reservation:
    """Choose the noise, check the limits, and commit the round's releases to the ledger."""
    config, site, request = current.config, current.site, current.request
    privacy, steps, policy = config.privacy, config.train.local_steps, site.policy
    limit = Limit(privacy.epsilon, privacy.delta)
    q = config.train.batch_size / len(current.data)
    ledger = site.ledger
    past = ledger.releases(site.dataset, request.run)
    planned = max(request.steps_left, steps)
    noise_multiplier = noise_for(past, limit, sampling_rate=q, steps=planned)
    policy.check_noise(noise_multiplier)
    return ledger.reserve(
        site.dataset,
        request.run,
        request.round,
        Release(q, noise_multiplier, steps),
        planned=planned,
        run_limit=limit,
        node_limit=policy.limit,
        max_rounds=policy.max_rounds,
        per_day=policy.max_rounds_per_day,
    )


def _streams(config: Config, client: str, attempt: int) -> step.RandomStreams:
    if config.privacy.noise == "secure":
        return step.RandomStreams(randomness.secure(), randomness.secure())
    seed = config.seed
    return step.RandomStreams(
        randomness.seeded(seed, "sampling", client, attempt),
        randomness.seeded(seed, "noise", client, attempt),
    )


def run_local_steps(
    current: Round, start: Adapter, reservation: Reservation, streams: step.RandomStreams
) -> Adapter:
    """Return the site's adapter after the round's private steps."""
    config, request, client = current.config, current.request, current.site.client
    return local_round.run_round(
        current.model,
        current.data,
        start,
        current.received.drift,
        local=local_round.LocalSettings(
            current.method,
            request.round,
            config.num_server_rounds,
            config.train,
            config.rule,
            config.privacy.clip_norm,
            randomness.seed_of(config.seed, client, request.attempt),
        ),
        reservation=reservation,
        streams=streams,
    )


def _log_durations(current: Round, clock: Sequence[float]) -> None:
    """Log the seconds of accounting and of training, for benchmarks.

    Privacy: batch time depends on private data, so it is logged locally and never sent.
    """
    if "LALORA_TIMING" in os.environ:
        accounting, training = (after - before for before, after in pairwise(clock))
        attempt, client = current.request.attempt, current.site.client
        _log.info("LaLoRA timing %d %s %.3f %.3f", attempt, client, accounting, training)


def _encoded(current: Round, result: Adapter, encode: secagg.UploadEncoder) -> secagg.Upload:
    """Return the factors that travel in this round, encoded for the wire."""
    return encode(select(result, current.sent), select(current.received.adapter, current.sent))


def _spent(config: Config, site: Site, run: str) -> float:
    """Return the site's ε of the run so far, rounded up to 0.01."""
    spent = epsilon(site.ledger.releases(site.dataset, run), config.privacy.delta)
    return spent if math.isinf(spent) else math.ceil(spent * 100) / 100


def _reply(current: Round, upload: Mapping[str, np.ndarray]) -> RecordDict:
    site, request = current.site, current.request
    return messages.TrainReply(
        upload=upload,
        round=request.round,
        epsilon=_spent(current.config, site, request.run),
        num_examples=len(current.data) if site.policy.public_size else None,
    ).record()


def train(message: Message, context: Context) -> RecordDict:
    """Train one round and return the reply.

    Privacy: the round's releases are on the ledger before the first one is drawn.
    """
    current = _prepare(message, context)
    saved = current.saved_reply()
    if saved is not None:
        return _reply(current, saved)
    start = current.start()
    # A stage of secure aggregation out of order is refused here, before anything is spent.
    make_encoder = secagg.UPLOAD_ENCODERS[current.config.secure_aggregation]
    encode_upload = make_encoder(message.content, context, current.request)
    clock = [time.monotonic()]
    reservation = reserve(current)
    clock.append(time.monotonic())
    streams = _streams(current.config, current.site.client, current.request.attempt)
    result = run_local_steps(current, start, reservation, streams)
    clock.append(time.monotonic())
    _log_durations(current, clock)
    upload = _encoded(current, result, encode_upload)
    current.save_files(result, upload)
    return _reply(current, upload)
