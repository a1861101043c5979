"""The client's secrets between two messages of an attempt, and the order of the stages.

They are kept in Flower's ``context.state``, which is in the SuperNode's memory only.
"""

from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Context

from lalora_app.secagg.messages import (
    SECAGG,
    StageError,
    Value,
    bytes_of,
    columns,
    mapping_of,
    run_and_attempt_of,
)
from lalora_app.wire.messages import count_of

# The stages that a client has finished, as stored in its state.
ADVERTISED, SHARED, TRAINING = "advertised", "shared", "training"
MASKED_SENT, DONE = "masked", "done"


@dataclass(frozen=True)
class ClientState:
    """The state of one client in one attempt.

    Attributes:
        stage: the last finished stage.
        run: name of the run.
        attempt: number of the attempt.
        client: number of this client in the attempt.
        mask_key: private key; with another client's public mask key it gives the mask of the pair.
        cipher_key: private key; with another client's public cipher key it gives the key that
            encrypts shares.
        seed: key of this client's own mask.
        mask_keys: public mask key per client.
        cipher_keys: public cipher key per client.
        seed_shares: share of the seed per client that may send a vector.
        key_shares: share of the private mask key per client that may send a vector.
    """

    stage: str
    run: str
    attempt: int
    client: int
    mask_key: bytes = b""
    cipher_key: bytes = b""
    seed: bytes = b""
    mask_keys: dict[int, bytes] = field(default_factory=dict)
    cipher_keys: dict[int, bytes] = field(default_factory=dict)
    seed_shares: dict[int, bytes] = field(default_factory=dict)
    key_shares: dict[int, bytes] = field(default_factory=dict)

    def save(self, context: Context) -> None:
        """Save the state for the next message."""
        values: dict[str, Value] = {}
        for name, value in vars(self).items():
            values |= columns(name, value) if isinstance(value, dict) else {name: value}
        context.state.config_records[SECAGG] = ConfigRecord(values)


def _load(context: Context) -> ClientState:
    """Return the state saved by :meth:`ClientState.save`.

    Raises:
        StageError: if there is none, for example after a restart of the SuperNode.
    """
    record = context.state.config_records.get(SECAGG, ConfigRecord())
    if not record:
        raise StageError(
            'this client has no state of the attempt: the stage "advertise" must come first'
        )
    return ClientState(
        str(record["stage"]),
        *run_and_attempt_of(record),
        client=count_of(record, "client", 0),
        mask_key=bytes_of(record, "mask_key"),
        cipher_key=bytes_of(record, "cipher_key"),
        seed=bytes_of(record, "seed"),
        mask_keys=mapping_of(record, "mask_keys"),
        cipher_keys=mapping_of(record, "cipher_keys"),
        seed_shares=mapping_of(record, "seed_shares"),
        key_shares=mapping_of(record, "key_shares"),
    )


def check(holds: bool, law: str) -> None:
    """Raise `StageError` with the text ``law`` unless ``holds``."""
    if not holds:
        raise StageError(law)


def state_after(stage: str, context: Context, order: tuple[str, int]) -> ClientState:
    """Return the saved state of an attempt whose last finished stage is ``stage``.

    Args:
        stage: the stage that must come immediately before.
        context: Flower's context of the client.
        order: run and attempt of the received message.

    Raises:
        StageError: if another stage or another attempt is saved.
    """
    state = _load(context)
    check(state.stage == stage, f"this stage follows {stage!r}, not {state.stage!r}")
    check((state.run, state.attempt) == order, "the message belongs to another attempt")
    return state
