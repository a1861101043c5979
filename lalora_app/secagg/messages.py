"""What the stages of secure aggregation send each other, and how it is read: nothing is trusted."""

from collections.abc import Mapping

from flwr.app import ConfigRecord, RecordDict

from lalora_app.wire.code_version import code_hash
from lalora_app.wire.messages import CONFIG, count_of
from lalora_app.wire.tensors import WireError

# Flower's own union of what a ConfigRecord takes.
Value = (
    int | float | str | bytes | bool
    | list[int] | list[float] | list[str] | list[bytes] | list[bool]
)  # fmt: skip

SECAGG = "secagg"  # the record, in every message of a stage and in a client's state
MASKED = "masked"  # the array of a reply in the place of the tensors


class StageError(WireError):
    """A stage that does not follow from the ones before; its text stays on the client."""


def reply_of(values: Mapping[str, Value]) -> RecordDict:
    """Return a client's reply to a stage."""
    code = ConfigRecord({"code": code_hash()})
    return RecordDict({CONFIG: code, SECAGG: ConfigRecord(dict(values))})


def columns(name: str, values: Mapping[int, bytes]) -> dict[str, Value]:
    """Return a mapping from clients as two columns of a ConfigRecord."""
    return {f"{name}-of": list(values), name: list(values.values())}


def record_of(content: RecordDict) -> ConfigRecord:
    """Return the record of a message's stage; an empty one where there is none."""
    return content.config_records.get(SECAGG, ConfigRecord())


def clients_of(record: ConfigRecord, name: str) -> list[int]:
    """Read a list of clients, none of them twice.

    Raises:
        WireError: if it is anything else.
    """
    found = record.get(name)
    if not isinstance(found, list) or not all(type(client) is int for client in found):
        raise WireError(f"{name} must be a list of integers")
    if len(set(found)) != len(found):
        raise WireError(f"{name} must not name a client twice")
    return [int(client) for client in found]


def bytes_of(record: ConfigRecord, name: str) -> bytes:
    """Read a key or the like.

    Raises:
        WireError: if it is no bytes.
    """
    found = record.get(name)
    if not isinstance(found, bytes):
        raise WireError(f"{name} must be bytes")
    return found


def mapping_of(record: ConfigRecord, name: str) -> dict[int, bytes]:
    """Read what :func:`columns` has written.

    Raises:
        WireError: if it is anything else.
    """
    clients, listed = clients_of(record, f"{name}-of"), record.get(name)
    found = [v for v in listed if isinstance(v, bytes)] if isinstance(listed, list) else []
    if not isinstance(listed, list) or len(found) != len(listed):
        raise WireError(f"{name} must be a list of bytes")
    if len(found) != len(clients):
        raise WireError(f"{name} must have one entry a client")
    return dict(zip(clients, found, strict=True))


def run_and_attempt_of(record: ConfigRecord) -> tuple[str, int]:
    """Read which run and attempt a stage belongs to.

    Raises:
        WireError: if a key is missing or mistyped.
    """
    run = record.get("run")
    if not isinstance(run, str):
        raise WireError("run must be a name")
    return run, count_of(record, "attempt", 1)
