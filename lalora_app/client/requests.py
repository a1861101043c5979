"""Answer the server's query and train requests at one site, with the model.

Model and data are loaded first, then the ledger reserves the round's releases, and only then the
training draws any noise. `answers.py` answers the requests that need no model.
"""

import logging
import os
import time
from collections.abc import Sequence
from itertools import pairwise

from flwr.app import Context, Message, RecordDict

from lalora_app.adapter.factors import Adapter, select
from lalora_app.client import class_sums, data_cache, local_round, prefix_cache
from lalora_app.client.limits import remember_size, reserve
from lalora_app.client.received_round import (
    Asked,
    Round,
    ignoring_disk_errors,
    receive,
    run_config_of,
)
from lalora_app.client.shared_round import SharedPart, lattice_for, shared_upload
from lalora_app.client.site import Site, admit
from lalora_app.data.encoding import Encoded
from lalora_app.models import backbone
from lalora_app.privacy import randomness
from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step import step
from lalora_app.secagg.upload import Upload, UploadEncoder
from lalora_app.settings.run_config import Config
from lalora_app.wire import messages
from lalora_app.wire.same_model import check_same_model

_log = logging.getLogger("flwr")

Loaded = tuple[backbone.Backbone, Adapter, Encoded]


def _load(config: Config, site: Site) -> Loaded:
    """Return the model, its initial adapter and the examples that its training takes.

    Loading can fail on this side, and a failure here must not cost privacy budget.
    """
    model, start, encoded = _model_and_data(config, site)
    with ignoring_disk_errors():
        remember_size(site, config, len(encoded))
    return model, start, prefix_cache.with_states(model, encoded, site)


def _model_and_data(config: Config, site: Site) -> Loaded:
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


def hello(message: Message, context: Context) -> RecordDict:
    """Return the site's name, rank and base model, after checking that its data can take part.

    Privacy: nothing is released; the hashes are those of public weights.
    """
    config = run_config_of(message, context)
    site = admit(config, context.node_config, context.node_id)
    model = _load(config, site)[0]
    return messages.SiteHello(site.client, site.rank, model.fingerprint).record()


def _prepare(asked: Asked) -> Round:
    """Load everything that a checked train request needs; nothing is spent."""
    config, site = asked.config, asked.site
    model, like, data = _load(config, site)
    check_same_model(site.client, model.fingerprint, asked.model)
    received = receive(asked, like)
    return Round(config, asked.method, site, asked.request, model, data, received)


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
    """Return the site's adapter after the round's private steps, or with its class sums."""
    config, request, client = current.config, current.request, current.site.client
    if config.sums_classes(request.round):
        return class_sums.run_class_sums(
            current.model,
            current.data,
            start,
            current.received.drift,
            micro_batch=config.train.micro_batch,
            reservation=reservation,
            streams=streams,
        )
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
            config.privacy.clipping,
            config.train.batch_size if config.has_tasks else 0.0,
            current.site.closed_classes(config),
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


def _encoded(current: Round, result: Adapter, encode: UploadEncoder) -> Upload:
    """Return the factors that travel in this round, encoded for the wire."""
    return encode(select(result, current.sent), select(current.received.adapter, current.sent))


def _own_noise(
    asked: Asked, current: Round, start: Adapter, encode: UploadEncoder, clock: list[float]
) -> tuple[Adapter, Upload]:
    """Return the site's adapter after local steps with its own noise, and the upload."""
    config, site, request = asked.config, asked.site, asked.request
    reservation = reserve(config, site, request, len(current.data))
    clock.append(time.monotonic())
    streams = _streams(config, site.client, request.attempt)
    result = run_local_steps(current, start, reservation, streams)
    return result, _encoded(current, result, encode)


def _shared_noise(
    asked: Asked, current: Round, start: Adapter, part: SharedPart, clock: list[float]
) -> tuple[Adapter, Upload]:
    """Return the unchanged adapter, and the site's part of a sum with shared noise."""
    config, site, request = asked.config, asked.site, asked.request
    lattice = lattice_for(current, start, part)
    reservation = reserve(config, site, request, len(current.data), part.cohort, part.uid)
    clock.append(time.monotonic())
    streams = _streams(config, site.client, request.attempt)
    return start, shared_upload(current, start, part, lattice, reservation, streams)


def train(asked: Asked, way: UploadEncoder | SharedPart) -> RecordDict:
    """Train one round and return the reply.

    Args:
        asked: a checked request that has not been answered before.
        way: the function that makes the reply's tensors of the factors; or the attempt of a round
            with shared noise, in which no factor changes at the site.

    Privacy: the round's releases are on the ledger before the first one is drawn.
    """
    current = _prepare(asked)
    start, clock = current.start(), [time.monotonic()]
    if isinstance(way, SharedPart):
        result, upload = _shared_noise(asked, current, start, way, clock)
    else:
        result, upload = _own_noise(asked, current, start, way, clock)
    clock.append(time.monotonic())
    _log_durations(current, clock)
    current.save_files(result, upload)
    return asked.reply(upload, len(current.data))
