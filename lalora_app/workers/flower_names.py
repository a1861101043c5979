"""The private names of Flower that messages outside a SuperLink need; `wire` has the others.

`tests/project/test_flower_private_names.py` tells which feature breaks when one of them changes.
"""

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lalora_app.wire.flower_bytes import message_from_bytes as message_from_bytes
from lalora_app.wire.flower_bytes import message_to_bytes as message_to_bytes
from lalora_app.wire.flower_bytes import records_from_bytes, records_to_bytes

RAISED = 2  # Flower's error code of a ClientApp that raised
LOST = 0  # and of a simulated client whose process has ended
SERVER = 1  # node id of the server, and the id of the only run


def identify() -> None:
    """Let this process build Messages, as the process of a running app may."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = SERVER


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which its reply names."""
    message.metadata.__dict__["_message_id"] = message_id


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Return Flower's reply of a client that gave none."""
    return Message(Error(code, reason), reply_to=message)


def new_context(
    node: int, node_config: dict[str, int | str], run_config: dict[str, bool | float | int | str]
) -> Context:
    """Return the context of a node, or of the server, without any state."""
    return Context(
        run_id=SERVER,
        node_id=node,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )


def state_to_bytes(context: Context) -> bytes:
    """Return the state of a node's context between two messages."""
    return records_to_bytes(context.state)


def load_state(context: Context, data: bytes) -> None:
    """Set the state of a context from the bytes of :func:`state_to_bytes`; b"" is no state."""
    context.state = records_from_bytes(data)
