"""The message fields of the protocol's stages, and functions that read and check them."""

import hashlib
from collections.abc import Mapping

from flwr.app import ConfigRecord, Message, RecordDict

from lalora_app.wire.code_version import code_hash
from lalora_app.wire.messages import count_of
from lalora_app.wire.refusals import RefusedError
from lalora_app.wire.tensors import WireError

# The types of values that a Flower ConfigRecord accepts.
Value = (
    int | float | str | bytes | bool
    | list[int] | list[float] | list[str] | list[bytes] | list[bool]
)  # fmt: skip

# Names of the records of the stages in a message and in its reply.
ADVERTISE, SHARE, UNMASK = "advertise", "share", "unmask"
SECAGG = "secagg"  # name of the record in a training request
KEYS_MESSAGE = "train.secagg"  # type of a message that has stages only
MOST_CLIENTS = 1000  # of an attempt: each makes a share of every secret for each other
MASKED = "masked"  # name of the masked vector in a reply, in place of the tensors


class StageError(WireError):
    """A message breaks the order or the rules of the stages; its text is never sent."""


def reply_of(values: Mapping[str, Value]) -> ConfigRecord:
    """Return a client's reply to a stage, with the given values."""
    return ConfigRecord({"code": code_hash()} | dict(values))


def stage_reply(message: Message, stage: str) -> ConfigRecord:
    """Return the record of one stage in a client's reply.

    Raises:
        WireError: if the record is missing or a refusal, or the client runs other code.
    """
    record = message.content.config_records.get(stage, ConfigRecord())
    if not record:
        raise WireError("the reply lacks this stage")
    if "refusal" in record:
        raise RefusedError(str(record["refusal"]))
    if record.get("code") != code_hash():
        raise WireError("the client runs other code than the server")
    return record


def columns(name: str, values: Mapping[int, bytes]) -> dict[str, Value]:
    """Return a mapping {client: bytes} as two lists of a ConfigRecord, clients and values."""
    return {f"{name}-of": list(values), name: list(values.values())}


def record_of(content: RecordDict, name: str) -> ConfigRecord:
    """Return a record of a message. Limit: an empty record if it is missing."""
    return content.config_records.get(name, ConfigRecord())


def directory_digest(
    mask_keys: Mapping[int, bytes], cipher_keys: Mapping[int, bytes], colluding: int | None
) -> bytes:
    """Return SHA-256 of the public keys of an attempt's clients, and c of shared noise."""
    listed = (sorted(mask_keys.items()), sorted(cipher_keys.items()), colluding)
    return hashlib.sha256(repr(listed).encode()).digest()


def clients_of(record: ConfigRecord, name: str) -> list[int]:
    """Read a list of client numbers without duplicates.

    Raises:
        WireError: if the field is missing, has another type, or names a client twice.
    """
    found = record.get(name)
    if not isinstance(found, list) or not all(type(client) is int for client in found):
        raise WireError(f"{name} must be a list of integers")
    if len(set(found)) != len(found):
        raise WireError(f"{name} must not name a client twice")
    return [int(client) for client in found]


def bytes_of(record: ConfigRecord, name: str) -> bytes:
    """Read a field of type bytes, such as a key.

    Raises:
        WireError: if the field is missing or has another type.
    """
    found = record.get(name)
    if not isinstance(found, bytes):
        raise WireError(f"{name} must be bytes")
    return found


def mapping_of(record: ConfigRecord, name: str) -> dict[int, bytes]:
    """Read a mapping {client: bytes}; inverse of :func:`columns`.

    Raises:
        WireError: if a list is missing or has another type, or the lengths differ.
    """
    clients, listed = clients_of(record, f"{name}-of"), record.get(name)
    found = [v for v in listed if isinstance(v, bytes)] if isinstance(listed, list) else []
    if not isinstance(listed, list) or len(found) != len(listed):
        raise WireError(f"{name} must be a list of bytes")
    if len(found) != len(clients):
        raise WireError(f"{name} must have one entry per client")
    return dict(zip(clients, found, strict=True))


def run_and_attempt_of(record: ConfigRecord) -> tuple[str, int]:
    """Read the run and the attempt of a message.

    Raises:
        WireError: if a field is missing or has another type.
    """
    run = record.get("run")
    if not isinstance(run, str):
        raise WireError("run must be a name")
    return run, count_of(record, "attempt", 1)
