"""One checked train request, and the files that the site keeps for it.

Every saved tensor was sent by the server or is made of noised gradients, so saving it costs no
privacy.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict
from safetensors import SafetensorError

from lalora_app.adapter.factors import Adapter, Factors
from lalora_app.client import held_download, last_reply, resident_factors
from lalora_app.client.site import Site
from lalora_app.data.encoding import Encoded
from lalora_app.methods.method import Method
from lalora_app.models.backbone import Backbone
from lalora_app.secagg.client import Upload
from lalora_app.settings.names import NONE
from lalora_app.settings.run_config import Config
from lalora_app.wire import messages

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


def download_file(site: Site, request: messages.TrainRequest) -> Path:
    """Return the file of the server's last tensors in the request's run."""
    return held_download.download_file(site.state, site.dataset, site.client, request.run)


def receive(content: RecordDict, config: Config, like: Adapter, download: Path) -> Received:
    """Return a request's tensors; tensors that it left out come from the site's own file.

    Args:
        content: the request's records; none of them is trusted.
        config: the run's config.
        like: the site's own adapter, for names and shapes.
        download: the file from :func:`download_file`.

    Raises:
        WireError: if a tensor does not fit, or was left out and is not in the file.
    """
    whole = held_download.completed(content, download)
    adapter, drift = messages.adapter_of(whole, like), messages.drift_of(whole, like)
    return Received(adapter, drift, messages.digest(whole, config))


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
    model: Backbone
    data: Encoded
    received: Received

    @property
    def _is_last_of_site(self) -> bool:
        return self.request.steps_left <= self.config.train.local_steps

    @property
    def _keeps_reply(self) -> bool:
        """Whether a repeated request may be answered with the saved reply.

        Under secure aggregation every reply has masks of its own: two sums of one round over
        different clients would reveal the difference between them.
        """
        return self.config.secure_aggregation == NONE

    @property
    def _reply_file(self) -> Path:
        return last_reply.reply_file(self.site.state, self.site.dataset, self.site.client)

    @property
    def _resident_file(self) -> Path:
        return resident_factors.resident_file(self.site.state, self.site.dataset, self.request.run)

    def saved_reply(self) -> Adapter | None:
        """Return the upload that has answered the same request before; None: it is new."""
        if not self._keeps_reply:
            return None
        return last_reply.load_if_same_request(self._reply_file, self.received.digest)

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
            if self._keeps_reply:
                last_reply.save_reply(self._reply_file, self.received.digest, dict(upload))
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
        file = download_file(self.site, self.request)
        if self._is_last_of_site:
            file.unlink(missing_ok=True)
        else:
            held_download.save_download(file, self.received.adapter, self.received.drift)
