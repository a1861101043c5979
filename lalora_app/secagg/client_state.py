"""The client's secrets between two messages of an attempt, and the order of the stages.

They are kept in Flower's ``context.state``, which is in the SuperNode's memory only: one record per
attempt, as keys of later attempts are exchanged during the present one.
"""

from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Context

from lalora_app.secagg import masks
from lalora_app.secagg.messages import (
    StageError,
    Value,
    bytes_of,
    columns,
    directory_digest,
    mapping_of,
    run_and_attempt_of,
)
from lalora_app.shared_noise.shares import Cohort
from lalora_app.wire.messages import count_of

# The stages that a client has finished, as stored in its state.
ADVERTISED, SHARED, MASKED_SENT = "advertised", "shared", "masked"
OPEN_ATTEMPTS = 3  # the present one, the next one with its shares, the one after it with its keys
NO_SHARED_NOISE = -1
_PREFIX = "secagg-"
_TRAINED = f"{_PREFIX}trained"  # record with the last attempt of each run that began to train


def record_name(attempt: int) -> str:
    """Return the name of an attempt's record in the client's state."""
    return f"{_PREFIX}{attempt}"


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
        identities: public signing key per client that has one; not checked yet.
        signatures: its signature of the other two keys; not checked yet.
        seed_shares: share of the seed per client that may send a vector.
        key_shares: share of the private mask key per client that may send a vector.
        colluding: c of a run with shared noise; negative without it.
        noise_seeds: seeds of this client's own noise, by component.
        noise_shares: joined shares of the noise seeds per client that may send a vector.
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
    identities: dict[int, bytes] = field(default_factory=dict)
    signatures: dict[int, bytes] = field(default_factory=dict)
    seed_shares: dict[int, bytes] = field(default_factory=dict)
    key_shares: dict[int, bytes] = field(default_factory=dict)
    colluding: int = NO_SHARED_NOISE
    noise_seeds: dict[int, bytes] = field(default_factory=dict)
    noise_shares: dict[int, bytes] = field(default_factory=dict)

    @property
    def cohort(self) -> Cohort | None:
        """The cohort of shared noise; None without it."""
        return Cohort.of(len(self.mask_keys), self.colluding) if self.colluding >= 0 else None

    @property
    def directory(self) -> bytes:
        """SHA-256 of the public keys of all clients, and c."""
        colluding = self.colluding if self.colluding >= 0 else None
        return directory_digest(self.mask_keys, self.cipher_keys, colluding)

    @property
    def threshold(self) -> int:
        """The number of shares that reconstruct a secret of this attempt."""
        return self.cohort.threshold if self.cohort else masks.threshold(len(self.mask_keys))

    def save(self, context: Context) -> None:
        """Save the state for the next message."""
        values: dict[str, Value] = {}
        for name, value in vars(self).items():
            values |= columns(name, value) if isinstance(value, dict) else {name: value}
        context.state.config_records[record_name(self.attempt)] = ConfigRecord(values)


def _loaded(record: ConfigRecord) -> ClientState:
    return ClientState(
        str(record["stage"]),
        *run_and_attempt_of(record),
        client=count_of(record, "client", 0),
        mask_key=bytes_of(record, "mask_key"),
        cipher_key=bytes_of(record, "cipher_key"),
        seed=bytes_of(record, "seed"),
        mask_keys=mapping_of(record, "mask_keys"),
        cipher_keys=mapping_of(record, "cipher_keys"),
        identities=mapping_of(record, "identities"),
        signatures=mapping_of(record, "signatures"),
        seed_shares=mapping_of(record, "seed_shares"),
        key_shares=mapping_of(record, "key_shares"),
        colluding=count_of(record, "colluding", NO_SHARED_NOISE),
        noise_seeds=mapping_of(record, "noise_seeds"),
        noise_shares=mapping_of(record, "noise_shares"),
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
        StageError: if the attempt has another stage or no state, for example after a restart of the
            SuperNode, or if it is an attempt of another run.
    """
    record = context.state.config_records.get(record_name(order[1]), ConfigRecord())
    check(bool(record), 'this attempt has no state: the stage "advertise" must come first')
    state = _loaded(record)
    check(state.stage == stage, f"this stage follows {stage!r}, not {state.stage!r}")
    check(state.run == order[0], "the message belongs to another run")
    return state


def _keep_only(context: Context, run: str, attempts: range) -> None:
    """Delete the state of other runs and of all other attempts."""
    records = context.state.config_records
    kept = {record_name(attempt) for attempt in attempts}
    for name in [name for name in records if name.startswith(_PREFIX)]:
        if name != _TRAINED and (name not in kept or records[name].get("run") != run):
            del records[name]


def begin(state: ClientState, context: Context) -> None:
    """Save the state of a new attempt, and delete that of other runs and of attempts long past.

    Raises:
        StageError: if this client began to train in this attempt or in a later one.
    """
    trained = context.state.config_records.get(_TRAINED, ConfigRecord())
    last = count_of(trained, state.run, 1) if state.run in trained else 0
    check(state.attempt > last, "an attempt that began to train must not begin again")
    _keep_only(context, state.run, range(state.attempt - OPEN_ATTEMPTS + 1, state.attempt + 1))
    state.save(context)


def close(state: ClientState, context: Context) -> None:
    """Delete the state of an attempt and of earlier ones, and note that it began to train."""
    trained = context.state.config_records.get(_TRAINED, ConfigRecord())
    noted = dict(trained) | {state.run: state.attempt}
    context.state.config_records[_TRAINED] = ConfigRecord(noted)
    _keep_only(context, state.run, range(state.attempt + 1, state.attempt + OPEN_ATTEMPTS))
