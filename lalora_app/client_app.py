"""The ClientApp: one message in, one reply out; every error becomes a fixed sentence."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lalora_app.client import answers
from lalora_app.secagg import client as secagg
from lalora_app.site_worker.hand_over import by_site_worker

app = ClientApp()


def _answer(message: Message, context: Context, handle: answers.Handler) -> Message:
    """Reply with the content from ``handle``, or with a fixed sentence if it fails."""
    return Message(answers.content_or_refusal(message, context, handle), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer with name, rank and base-model hashes, after checks of config and data.

    Privacy: spends nothing.
    """
    return _answer(message, context, by_site_worker("query", answers.hello))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round under the client's own ledger and policy, or refuse."""
    return _answer(message, context, by_site_worker("train", answers.train))


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
