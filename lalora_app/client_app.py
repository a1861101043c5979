"""The ClientApp: one message in, one reply out; every error becomes a fixed sentence."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lalora_app.client import answers
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
    """Train one round under the client's own ledger and policy, or refuse.

    A stage of a later attempt in the same message is answered in any case, and after it.
    """
    reply = _answer(message, context, by_site_worker("train", answers.train))
    answers.add_stages(reply.content, message, context)
    return reply


@app.train("secagg")
def secagg(message: Message, context: Context) -> Message:
    """Answer stages of secure aggregation that need no model; spends nothing."""
    content = RecordDict()
    answers.add_stages(content, message, context)
    return Message(content, reply_to=message)
