"""Flower's messages, contexts and records as bytes, by private names of Flower and no others.

`tests/project/test_flower_private_names.py` tells which feature breaks when one of them changes.
"""

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto


def message_to_bytes(message: Message) -> bytes:
    """Return a message as it is sent."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def message_from_bytes(data: bytes) -> Message:
    """Return the message of :func:`message_to_bytes`."""
    return message_from_proto(MessageProto.FromString(data))


def context_to_bytes(context: Context) -> bytes:
    """Return a node's context: its id, its config, its state and the app's run config."""
    data: bytes = context_to_proto(context).SerializeToString()
    return data


def context_from_bytes(data: bytes) -> Context:
    """Return the context of :func:`context_to_bytes`."""
    return context_from_proto(ContextProto.FromString(data))


def records_to_bytes(records: RecordDict) -> bytes:
    """Return the content of a message, or the state of a context."""
    data: bytes = recorddict_to_proto(records).SerializeToString()
    return data


def records_from_bytes(data: bytes) -> RecordDict:
    """Return the records of :func:`records_to_bytes`; b"" gives none."""
    return recorddict_from_proto(RecordDictProto.FromString(data))
