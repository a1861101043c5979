"""The private names of Flower that messages outside a SuperLink need, and nothing else.

`tests/project/test_flower_private_names.py` tells which feature breaks when one of them changes.
"""

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.task_identity import TaskIdentity

RAISED = 2  # Flower's error code of a ClientApp that raised
LOST = 0  # and of a simulated client whose process has ended
SERVER = 1  # node id of the server, and the id of the only run


def identify() -> None:
    """Let this process build Messages, as the process of a running app may."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = SERVER


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which its reply names."""
    message.metadata.__dict__["_message_id"] = message_id


def message_to_bytes(message: Message) -> bytes:
    """Return a message as it is sent."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def message_from_bytes(data: bytes) -> Message:
    """Return the message of :func:`message_to_bytes`."""
    return message_from_proto(MessageProto.FromString(data))


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
    data: bytes = recorddict_to_proto(context.state).SerializeToString()
    return data


def load_state(context: Context, data: bytes) -> None:
    """Set the state of a context from the bytes of :func:`state_to_bytes`; b"" is no state."""
    context.state = recorddict_from_proto(RecordDictProto.FromString(data))
