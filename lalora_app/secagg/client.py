"""The client's four stages: advertise keys, share secrets, send a masked vector, help to unmask.

Between the messages of an attempt a client's secrets wait in Flower's ``context.state``, which
stays in the SuperNode's memory. The stages come in this order or not at all, so nothing trains
twice, no mask hides two vectors, and no client gives away both secrets of another.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.fernet import InvalidToken
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)

from lalora_app.adapter.factors import Adapter
from lalora_app.secagg import fixed_point, masks
from lalora_app.secagg.messages import (
    MASKED,
    SECAGG,
    StageError,
    Value,
    bytes_of,
    clients_of,
    columns,
    mapping_of,
    record_of,
    reply_of,
    run_and_attempt_of,
)
from lalora_app.wire.messages import TrainRequest, count_of

ADVERTISED, SHARED, TRAINING = "advertised", "shared", "training"
MASKED_SENT, DONE = "masked", "done"

Upload = Mapping[str, np.ndarray]
UploadEncoder = Callable[[Adapter, Adapter], Upload]


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between the stages of one attempt.

    Attributes:
        stage: the last one that it has done.
        run: of the attempt.
        attempt: its number.
        client: this client's own number in it.
        mask_key: private; its public part agrees on the masks of pairs.
        cipher_key: private; its public part agrees on the keys that shares travel under.
        seed: of the mask that is this client's alone.
        mask_keys: public keys of all clients.
        seed_shares: a share of the seed of each client that may send a vector.
        key_shares: a share of its ``mask_key``.
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
        """Keep it for the next message."""
        values: dict[str, Value] = {}
        for name, value in vars(self).items():
            values |= columns(name, value) if isinstance(value, dict) else {name: value}
        context.state.config_records[SECAGG] = ConfigRecord(values)


def _load(context: Context) -> ClientState:
    """Return what :meth:`State.keep` kept; a restarted SuperNode has nothing."""
    record = context.state.config_records.get(SECAGG, ConfigRecord())
    if not record:
        raise StageError("no stage of this attempt has been here: keys come first")
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


def _check(holds: bool, law: str) -> None:
    if not holds:
        raise StageError(law)


def _state_after(stage: str, context: Context, order: tuple[str, int]) -> ClientState:
    """Return the state, which must be that of the same attempt, right after ``stage``."""
    state = _load(context)
    _check(state.stage == stage, f"this stage follows {stage!r}, not {state.stage!r}")
    _check((state.run, state.attempt) == order, "this stage is of another attempt")
    return state


def advertise_keys(message: Message, context: Context) -> RecordDict:
    """Begin an attempt with fresh keys, and return their public parts.

    Whatever an attempt before has left is forgotten.
    """
    record = record_of(message.content)
    state = ClientState(
        ADVERTISED,
        *run_and_attempt_of(record),
        client=count_of(record, "client", 0),
        mask_key=masks.new_private_key(),
        cipher_key=masks.new_private_key(),
    )
    state.save(context)
    public = (masks.public_key_of(key) for key in (state.mask_key, state.cipher_key))
    return reply_of(dict(zip(("mask-key", "cipher-key"), public, strict=True)))


def _with_public_keys(state: ClientState, record: ConfigRecord) -> ClientState:
    """Return the state with all public keys, which must hold this client's own and no key twice."""
    mask_keys, cipher_keys = mapping_of(record, "mask-keys"), mapping_of(record, "cipher-keys")
    _check(set(mask_keys) == set(cipher_keys), "every client has two keys")
    _check(len(mask_keys) >= 2, "a sum of one client hides nothing")
    keys = [*mask_keys.values(), *cipher_keys.values()]
    _check(len(set(keys)) == len(keys), "no key may be there twice")
    for own, found in ((state.mask_key, mask_keys), (state.cipher_key, cipher_keys)):
        _check(found.get(state.client) == masks.public_key_of(own), "an own key is not there")
    return replace(state, mask_keys=mask_keys, cipher_keys=cipher_keys)


def share_secrets(message: Message, context: Context) -> RecordDict:
    """Share the two secrets among all clients, each share encrypted for the one that holds it.

    The reply commits to the seed, so that the server can tell a seed that was made of bad shares.
    """
    record = record_of(message.content)
    state = _with_public_keys(_state_after(ADVERTISED, context, run_and_attempt_of(record)), record)
    seed, own = secrets.token_bytes(32), state.client
    seeds = masks.split_into_shares(seed, state.mask_keys)
    keys = masks.split_into_shares(state.mask_key, state.mask_keys)
    sealed = {
        other: encrypt(
            masks.shared_secret(state.cipher_key, public),
            share_keys_plaintext_concat(own, other, seeds[other], keys[other]),
        )
        for other, public in state.cipher_keys.items()
        if other != own
    }
    held = replace(state, seed_shares={own: seeds[own]}, key_shares={own: keys[own]})
    replace(held, stage=SHARED, seed=seed).save(context)
    commitment = hashlib.sha256(seed).digest()
    return reply_of(columns("shares", sealed) | {"seed": commitment})


def _decrypted_shares(state: ClientState, source: int, sealed: bytes) -> tuple[bytes, bytes]:
    """Decrypt the two shares that another client has sent to this one."""
    _check(source in state.cipher_keys, "shares come from clients of the directory")
    try:
        plain = decrypt(masks.shared_secret(state.cipher_key, state.cipher_keys[source]), sealed)
    except InvalidToken as error:
        raise StageError("a share does not decrypt") from error
    sender, receiver, seed_share, key_share = share_keys_plaintext_separate(plain)
    _check((sender, receiver) == (source, state.client), "a share is of another pair")
    return seed_share, key_share


def _receive_shares(content: RecordDict, context: Context, request: TrainRequest) -> ClientState:
    """Take in the others' shares; from here on the attempt trains, and never again."""
    state = _state_after(SHARED, context, (request.run, request.attempt))
    replace(state, stage=TRAINING).save(context)
    sealed = mapping_of(record_of(content), "shares")
    _check(state.client not in sealed, "a client's own shares are not sent to it")
    opened = {source: _decrypted_shares(state, source, share) for source, share in sealed.items()}
    enough = len(opened) + 1 >= masks.threshold(len(state.mask_keys))
    _check(enough, "too few clients have shared their secrets")
    seeds = {source: pair[0] for source, pair in opened.items()}
    keys = {source: pair[1] for source, pair in opened.items()}
    return replace(state, seed_shares=state.seed_shares | seeds, key_shares=state.key_shares | keys)


def _masked_update(state: ClientState, upload: Adapter, start: Adapter) -> Upload:
    update = fixed_point.update_of(upload, start)
    words = fixed_point.quantise(update, len(state.mask_keys))
    words = words + masks.mask(state.seed, words.size)
    for other in state.seed_shares:
        if other != state.client:
            secret = masks.shared_secret(state.mask_key, state.mask_keys[other])
            words = words + masks.pair_mask(state.client, other, secret, words.size)
    return {MASKED: words}


def send_masked(content: RecordDict, context: Context, request: TrainRequest) -> UploadEncoder:
    """Return what turns an upload into a masked vector; call it before the ledger is asked.

    Raises:
        StageError: if the stages before are not all there; nothing has been spent then, and this
            attempt will not train any more.

    Privacy: the vector is uniformly random to everyone who lacks a mask; the upload is noised all
    the same, and its guarantee does not rest on the masks.
    """
    state = _receive_shares(content, context, request)

    def seal(upload: Adapter, start: Adapter) -> Upload:
        masked = _masked_update(state, upload, start)
        # The own secrets have done their work: others hold shares of them.
        spent = replace(state, mask_key=b"", cipher_key=b"", seed=b"")
        replace(spent, stage=MASKED_SENT).save(context)
        return masked

    return seal


def send_unmasked(content: RecordDict, context: Context, request: TrainRequest) -> UploadEncoder:
    """Send the tensors themselves."""
    return lambda upload, start: upload


UPLOAD_ENCODERS = {"none": send_unmasked, "secagg+": send_masked}


def unmask(message: Message, context: Context) -> RecordDict:
    """Return one share for every client: of the seed if its vector arrived, else of its mask key.

    Raises:
        StageError: if the two lists overlap, leave a client out, or too few vectors have arrived.

    Privacy: both secrets of a client would lay its vector open; this client gives one, once.
    """
    record = record_of(message.content)
    state = _state_after(MASKED_SENT, context, run_and_attempt_of(record))
    replace(state, stage=DONE, seed_shares={}, key_shares={}).save(context)
    arrived, lost = clients_of(record, "arrived"), clients_of(record, "lost")
    _check(not set(arrived) & set(lost), "no vector is both there and lost")
    _check({*arrived, *lost} == set(state.seed_shares), "every client's vector is there or lost")
    _check(state.client in arrived, "the own vector was sent")
    enough = len(arrived) >= masks.threshold(len(state.mask_keys))
    _check(enough, "too few vectors have arrived")
    given = {client: state.seed_shares[client] for client in arrived}
    given |= {client: state.key_shares[client] for client in lost}
    return reply_of(columns("shares", given))
