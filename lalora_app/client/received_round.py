"""One checked train request, and the files that the site keeps for it.

The first checks need neither model nor data, so this module imports no torch: :class:`Asked` is a
request after them, :class:`Round` is the request with everything that its training needs.
Every saved tensor was sent by the server or is made of noised gradients, so saving it costs no
privacy.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from safetensors import SafetensorError

from lalora_app.adapter.factors import Adapter, Factors
from lalora_app.client.site import Site, admit
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.method import Method
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.ledger_entries import releases_drawn, releases_of, worst_releases
from lalora_app.secagg.upload import Upload
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE
from lalora_app.settings.run_config import Config, parse
from lalora_app.settings.value_rules import DEVICE_LAW, is_device
from lalora_app.site_files import held_download, last_reply, resident_factors
from lalora_app.wire import messages
from lalora_app.wire.same_model import model_of

if TYPE_CHECKING:
    from lalora_app.data.encoding import Encoded
    from lalora_app.models.backbone import Backbone

_log = logging.getLogger("flwr")


@contextmanager
def ignoring_disk_errors() -> Iterator[None]:
    """Log disk errors while saving files for the next round, and go on.

    The reply has already used budget, so it must still be sent. The next round then starts from
    the server's copy.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        _log.error("LaLoRA client: files for the next round cannot be saved: %s", error)


def run_config_of(message: Message, context: Context) -> Config:
    """Return the config of the message's run, with the node's own device if it has one.

    Raises:
        ConfigError: if a key of the run or the node's device breaks its law.
    """
    node = context.node_config
    if "device" in node and not is_device(node["device"]):
        raise ConfigError(f"node config device={node['device']!r} {DEVICE_LAW}")
    own = {"model.device": node["device"]} if "device" in node else {}
    return parse({**context.run_config, **messages.run_config_of(message.content), **own})


def _keeps_reply(config: Config) -> bool:
    """Tell whether a repeated request may be answered with the saved reply.

    Under secure aggregation every reply has masks of its own: two sums of one round over different
    clients would reveal the difference between them.
    """
    return config.secure_aggregation == NONE


def _reply_file(site: Site) -> Path:
    return last_reply.reply_file(site.state, site.dataset, site.client)


@dataclass(frozen=True)
class Asked:
    """One train request after the checks that need neither model nor data.

    Attributes:
        config: the run's config.
        method: the run's method.
        site: this client, at the rank of the request.
        request: the server's order.
        model: the SHA-256 of each part of the server's base model.
        content: the request's records, with the tensors that it left out; not trusted.
        digest: a SHA-256 of the whole request.
    """

    config: Config
    method: Method
    site: Site
    request: messages.TrainRequest
    model: Mapping[str, str]
    content: RecordDict
    digest: str

    def repeated_reply(self) -> RecordDict | None:
        """Return the reply that has answered the same request before; None: it is new."""
        if not _keeps_reply(self.config):
            return None
        saved = last_reply.load_if_same_request(_reply_file(self.site), self.digest)
        return None if saved is None else self.reply(saved.upload, saved.num_examples)

    def reply(self, upload: Upload, num_examples: int) -> RecordDict:
        """Return the reply with these tensors and the ε spent so far, rounded up to 0.01."""
        site, delta = self.site, self.config.privacy.delta
        size = num_examples or None  # a client may have no example of the open task
        entries = site.ledger.entries(site.dataset, self.request.run)
        # A run with seeded noise is told the ε of its schedule; the ledger counts it as infinite.
        of = releases_drawn if self.config.privacy.noise == "seeded" else releases_of
        spent = epsilon(worst_releases(entries, delta, of), delta)
        return messages.TrainReply(
            upload=upload,
            round=self.request.round,
            epsilon=spent if math.isinf(spent) else math.ceil(spent * 100) / 100,
            num_examples=size if site.policy.public_size else None,
        ).record()


def read_request(message: Message, context: Context) -> Asked:
    """Check a train request as far as that needs neither model nor data; nothing is spent.

    Raises:
        ConfigError: if the run config or the node config breaks a law.
        PolicyError: if the run is outside the site's policy.
        HeldError: if the site does not hold the tensors that were left out.
        WireError: if the order does not fit the run config, or has no hashes of a base model.
    """
    config = run_config_of(message, context)
    method = method_of(config)
    site = admit(config, context.node_config, context.node_id)
    request, model = messages.parse_request(message.content, config), model_of(message.content)
    whole = held_download.completed(message.content, _download_file(site, request))
    if method.next_rank is not None:
        site = replace(site, rank=messages.rank_of(whole, site.rank))
    site, digest = site.in_round(config, request.round), messages.digest(whole, config)
    return Asked(config, method, site, request, model, whole, digest)


def _download_file(site: Site, request: messages.TrainRequest) -> Path:
    """Return the file of the server's last tensors in the request's run."""
    return held_download.download_file(site.state, site.dataset, site.client, request.run)


@dataclass(frozen=True)
class Received:
    """The server's tensors, with the parts that the request left out.

    Attributes:
        adapter: the global adapter at the site's rank.
        drift: the change of the frozen weights since the run began.
        digest: a SHA-256 of the whole request.
    """

    adapter: Adapter
    drift: Adapter
    digest: str


def receive(asked: Asked, like: Adapter) -> Received:
    """Return a request's tensors after checking them.

    Args:
        asked: the request.
        like: the site's own adapter, for names and shapes.

    Raises:
        WireError: if a tensor does not fit.
    """
    adapter = messages.adapter_of(asked.content, like)
    return Received(adapter, messages.drift_of(asked.content, like), asked.digest)


@dataclass(frozen=True)
class Round:
    """One checked train request, with everything that its training needs.

    Attributes:
        config: the run's config.
        method: the run's method.
        site: this client.
        request: the server's order.
        model: the frozen backbone with its adapter.
        data: the site's encoded examples.
        received: the server's tensors.
    """

    config: Config
    method: Method
    site: Site
    request: messages.TrainRequest
    model: "Backbone"
    data: "Encoded"
    received: Received

    @property
    def _is_last_of_site(self) -> bool:
        return self.request.steps_left <= self.config.train.local_steps

    @property
    def _resident_file(self) -> Path:
        return resident_factors.resident_file(self.site.state, self.site.dataset, self.request.run)

    def start(self) -> Adapter:
        """Return the server's adapter with the site's own resident factors."""
        versions, attempt = self.request.versions, self.request.attempt
        return resident_factors.with_residents(
            self._resident_file, self.received.adapter, versions, attempt
        )

    @property
    def sent(self) -> Factors:
        """The factors that travel up in this round."""
        last = self.config.is_last(self.request.attempt)
        return self.method.sent(self.request.round, last=last)

    def save_files(self, result: Adapter, upload: Upload) -> None:
        """Save resident factors, reply and download for the next round.

        Call this only after the ledger has counted the round. Otherwise a server could fill the
        disk with files of invented runs and spend no budget.

        Args:
            result: the site's adapter at the end of the round.
            upload: the tensors of the reply.
        """
        with ignoring_disk_errors():  # a failure here must not prevent the second block
            self.save_residents(result)
            if _keeps_reply(self.config):
                saved = last_reply.SavedReply(dict(upload), len(self.data))
                last_reply.save_reply(_reply_file(self.site), self.received.digest, saved)
        with ignoring_disk_errors():
            self._save_download()

    def save_residents(self, result: Adapter) -> None:
        """Save the factors of ``result`` that wait for their round; after the last, none."""
        request = self.request
        resident = self.method.resident(request.round, self.config.train.local_steps)
        waiting = frozenset() if self._is_last_of_site else resident
        resident_factors.save_residents(
            self._resident_file, result, waiting, request.versions, request.attempt
        )

    def _save_download(self) -> None:
        file = _download_file(self.site, self.request)
        if self._is_last_of_site:
            file.unlink(missing_ok=True)
        else:
            held_download.save_download(file, self.received.adapter, self.received.drift)
