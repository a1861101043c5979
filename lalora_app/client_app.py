"""The ClientApp: one message in, one reply out; every error becomes a fixed sentence."""

import logging
import traceback
from collections.abc import Callable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lalora_app.client import held_download, requests
from lalora_app.privacy.budget import BudgetError
from lalora_app.privacy.ledger import LedgerBusyError
from lalora_app.privacy.policy import PolicyError
from lalora_app.secagg import client as secagg
from lalora_app.secagg.fixed_point import RangeError
from lalora_app.secagg.messages import StageError
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.wire import messages, tensors
from lalora_app.wire.same_model import OtherModelError

app = ClientApp()
_log = logging.getLogger("flwr")


# The refusal of each kind of error; the first match counts.
_REFUSAL_KEYS: tuple[tuple[type[Exception], str], ...] = (
    (BudgetError, "budget"),
    (LedgerBusyError, "busy"),
    (PolicyError, "policy"),
    (ConfigError, "config"),
    (StageError, "stage"),
    (RangeError, "update"),
    (held_download.HeldError, "held"),
    (OtherModelError, "model"),
    (tensors.WireError, "request"),
)


# Keys of errors that would reveal the kind of values in a site's own rows.
_OF_ROWS = ("data.input-column", "data.label-column", "data.labels")


def _refusal_key(error: Exception, node: Mapping[str, object]) -> str:
    if isinstance(error, DataError):
        return "rows" if "data-path" in node and error.key in _OF_ROWS else error.key
    return next((key for kind, key in _REFUSAL_KEYS if isinstance(error, kind)), "internal")


def _answer(
    message: Message, context: Context, handle: Callable[[Message, Context], RecordDict]
) -> Message:
    """Reply with the content from ``handle``, or with a fixed sentence if it fails.

    Privacy: the text of an exception goes to the client's own log and never to the server.
    """
    try:
        content = handle(message, context)
    except Exception as error:  # of any kind: its text may hold private data
        _log.error("LaLoRA client: %s: %s", type(error).__name__, error)
        _log.debug("%s", traceback.format_exc())
        content = messages.refusal(_refusal_key(error, context.node_config))
    return Message(content, reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer with name, rank and base-model hashes, after checks of config and data.

    Privacy: spends nothing.
    """
    return _answer(message, context, requests.hello)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round under the client's own ledger and policy, or refuse."""
    return _answer(message, context, requests.train)


@app.train("advertise")
def advertise(message: Message, context: Context) -> Message:
    """Begin an attempt under secure aggregation with fresh keys. Spends nothing."""
    return _answer(message, context, secagg.advertise_keys)


@app.train("share")
def share(message: Message, context: Context) -> Message:
    """Share the secrets of this attempt's masks among its clients. Spends nothing."""
    return _answer(message, context, secagg.share_secrets)


@app.train("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Give shares that remove the masks from the sum of enough uploads; spends nothing."""
    return _answer(message, context, secagg.unmask)
