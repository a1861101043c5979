"""The content of the reply to each kind of message; every error becomes a fixed sentence.

Nothing here imports torch, transformers, PEFT or Opacus before a message needs a model. A site
starts a process per message, and they take seconds to import.
"""

import logging
import traceback
from collections.abc import Callable, Mapping

from flwr.app import Context, Message, RecordDict

from lalora_app.client.limits import check_limits
from lalora_app.client.received_round import Asked, read_request
from lalora_app.client.shared_round import SharedPart, open_shared, with_signature
from lalora_app.privacy.budget import BudgetError
from lalora_app.privacy.ledger import LedgerBusyError
from lalora_app.privacy.policy import PolicyError
from lalora_app.secagg.client import STAGES
from lalora_app.secagg.fixed_point import RangeError
from lalora_app.secagg.messages import ADVERTISE, StageError
from lalora_app.secagg.peers import PeerError
from lalora_app.secagg.upload import UPLOAD_ENCODERS, UploadEncoder
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.site_files import held_download
from lalora_app.wire import messages, tensors
from lalora_app.wire.same_model import OtherModelError

_log = logging.getLogger("flwr")

Handler = Callable[[Message, Context], RecordDict]


# The refusal of each kind of error; the first match counts.
_REFUSAL_KEYS: tuple[tuple[type[Exception], str], ...] = (
    (BudgetError, "budget"),
    (LedgerBusyError, "busy"),
    (PolicyError, "policy"),
    (ConfigError, "config"),
    (PeerError, "peers"),
    (StageError, "stage"),
    (RangeError, "update"),
    (held_download.HeldError, "held"),
    (OtherModelError, "model"),
    (tensors.WireError, "request"),
)


# Keys of errors that would reveal the kind of values in a site's own rows.
_OF_ROWS = (
    "data.input-column",
    "data.label-column",
    "data.labels",
    "data.task-column",
    "data.task-values",
)


def refusal_key(error: Exception, node: Mapping[str, object]) -> str:
    """Return the key of the fixed sentence for an error."""
    if isinstance(error, DataError):
        return "rows" if "data-path" in node and error.key in _OF_ROWS else error.key
    return next((key for kind, key in _REFUSAL_KEYS if isinstance(error, kind)), "internal")


def content_or_refusal(message: Message, context: Context, handle: Handler) -> RecordDict:
    """Return the content from ``handle``, or a fixed sentence if it fails.

    Privacy: the text of an exception goes to the client's own log and never to the server.
    """
    try:
        return handle(message, context)
    except Exception as error:  # of any kind: its text may hold private data
        _log.error("LaLoRA client: %s: %s", type(error).__name__, error)
        _log.debug("%s", traceback.format_exc())
        return messages.refusal(refusal_key(error, context.node_config))


def _stage(name: str) -> Handler:
    """Return the handler of a stage of secure aggregation; its content is one record."""

    def handle(message: Message, context: Context) -> RecordDict:
        record = message.content.config_records[name]
        reply = STAGES[name](record, context)
        if name == ADVERTISE:
            reply = with_signature(reply, record, context)
        return RecordDict({messages.CONFIG: reply})

    return handle


def add_stages(content: RecordDict, message: Message, context: Context) -> None:
    """Add the reply to each stage of secure aggregation in a message; none needs a model.

    Args:
        content: the content of the reply.
        message: the message, with one record per stage.
        context: Flower's context of the client.

    Limit: a stage that fails is a refusal in its own record, and changes no other record.
    """
    for name in [name for name in STAGES if name in message.content.config_records]:
        found = content_or_refusal(message, context, _stage(name))
        content[name] = found[messages.CONFIG]


def hello(message: Message, context: Context) -> RecordDict:
    """Return the site's name, rank and base model, after checking that its data can take part.

    Privacy: nothing is released; the hashes are those of public weights.
    """
    from lalora_app.client import requests  # imports torch, transformers and PEFT

    return requests.hello(message, context)


def train(message: Message, context: Context) -> RecordDict:
    """Train one round and return the reply; a repeated request gets the same reply.

    Privacy: the round's releases are on the ledger before the first one is drawn.
    """
    asked = read_request(message, context)
    repeated = asked.repeated_reply()
    if repeated is not None:
        return repeated
    # A stage of secure aggregation out of order is refused here, before anything is spent.
    way = _way_of_upload(asked, message, context)
    cohort = way.cohort if isinstance(way, SharedPart) else None
    check_limits(asked.config, asked.site, asked.request, cohort)
    from lalora_app.client import requests  # imports torch, transformers and PEFT

    return requests.train(asked, way)


def _way_of_upload(asked: Asked, message: Message, context: Context) -> UploadEncoder | SharedPart:
    """Return how the round's result leaves: as tensors with all of the noise, or as a part."""
    if asked.config.privacy.shared:
        return open_shared(asked, message.content, context)
    make_encoder = UPLOAD_ENCODERS[asked.config.secure_aggregation]
    return make_encoder(message.content, context, asked.request)
