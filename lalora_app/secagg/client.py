"""The client's four stages of the protocol, in this order.

* :func:`advertise_keys`: create two key pairs and send their public keys.
* :func:`share_secrets`: split the mask key and the mask seed into shares, encrypted for the others.
* :func:`send_masked`: after training, send the update plus masks.
* :func:`unmask`: send one share per client, with which the server removes the masks of the sum.

A stage out of order raises `StageError`. So no attempt trains twice, no mask is used for two
vectors, and no client reveals shares of both secrets of another client.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace

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
from lalora_app.secagg.client_state import (
    ADVERTISED,
    DONE,
    MASKED_SENT,
    SHARED,
    TRAINING,
    ClientState,
    check,
    state_after,
)
from lalora_app.secagg.messages import (
    MASKED,
    StageError,
    clients_of,
    columns,
    mapping_of,
    record_of,
    reply_of,
    run_and_attempt_of,
)
from lalora_app.wire.messages import TrainRequest, count_of

Upload = Mapping[str, np.ndarray]
UploadEncoder = Callable[[Adapter, Adapter], Upload]


def advertise_keys(message: Message, context: Context) -> RecordDict:
    """Stage 1: start an attempt with new keys and return the public keys.

    The state of an earlier attempt is overwritten.
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
    """Return the state with the public keys of all clients.

    Raises:
        StageError: if this client's own keys are missing, a key occurs twice, or there are fewer
            than two clients.
    """
    mask_keys, cipher_keys = mapping_of(record, "mask-keys"), mapping_of(record, "cipher-keys")
    check(set(mask_keys) == set(cipher_keys), "every client must have a mask key and a cipher key")
    check(
        len(mask_keys) >= 2, "there must be at least 2 clients: a sum of one upload is that upload"
    )
    keys = [*mask_keys.values(), *cipher_keys.values()]
    check(len(set(keys)) == len(keys), "every public key must be different")
    for own, found in ((state.mask_key, mask_keys), (state.cipher_key, cipher_keys)):
        check(
            found.get(state.client) == masks.public_key_of(own),
            "this client's own public keys must be among the keys",
        )
    return replace(state, mask_keys=mask_keys, cipher_keys=cipher_keys)


def share_secrets(message: Message, context: Context) -> RecordDict:
    """Stage 2: split the two secrets into shares, each encrypted for the client that will hold it.

    The reply contains the SHA-256 of the seed (a commitment), so that the server can detect a seed
    that was reconstructed from wrong shares.

    Raises:
        StageError: if the stage before is missing or the public keys are not acceptable.
    """
    record = record_of(message.content)
    state = _with_public_keys(state_after(ADVERTISED, context, run_and_attempt_of(record)), record)
    seed, own = secrets.token_bytes(32), state.client
    seeds = masks.split_into_shares(seed, state.mask_keys)
    keys = masks.split_into_shares(state.mask_key, state.mask_keys)
    encrypted = {
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
    return reply_of(columns("shares", encrypted) | {"seed": commitment})


def _decrypted_shares(state: ClientState, source: int, encrypted: bytes) -> tuple[bytes, bytes]:
    """Decrypt the shares of the two secrets of client ``source``.

    Raises:
        StageError: if the shares do not decrypt or belong to another pair of clients.
    """
    check(source in state.cipher_keys, "shares must come from a client with public keys")
    try:
        plain = decrypt(masks.shared_secret(state.cipher_key, state.cipher_keys[source]), encrypted)
    except InvalidToken as error:
        raise StageError("a share cannot be decrypted") from error
    sender, receiver, seed_share, key_share = share_keys_plaintext_separate(plain)
    check(
        (sender, receiver) == (source, state.client),
        "a share must name its sender and this client as receiver",
    )
    return seed_share, key_share


def _receive_shares(content: RecordDict, context: Context, request: TrainRequest) -> ClientState:
    """Decrypt and check the other clients' shares, before training.

    The state is saved as "training" first, so that this attempt cannot train a second time.
    """
    state = state_after(SHARED, context, (request.run, request.attempt))
    replace(state, stage=TRAINING).save(context)
    encrypted = mapping_of(record_of(content), "shares")
    check(
        state.client not in encrypted,
        "the shares of this client itself must not be among the shares",
    )
    opened = {
        source: _decrypted_shares(state, source, share) for source, share in encrypted.items()
    }
    enough = len(opened) + 1 >= masks.threshold(len(state.mask_keys))
    check(enough, "too few clients have shared their secrets")
    seeds = {source: pair[0] for source, pair in opened.items()}
    keys = {source: pair[1] for source, pair in opened.items()}
    return replace(state, seed_shares=state.seed_shares | seeds, key_shares=state.key_shares | keys)


def _masked_update(state: ClientState, upload: Adapter, start: Adapter) -> Upload:
    """Return the quantised update plus the client's own mask and one mask per other client."""
    update = fixed_point.update_of(upload, start)
    words = fixed_point.quantise(update, len(state.mask_keys))
    words = words + masks.mask(state.seed, words.size)
    for other in state.seed_shares:
        if other != state.client:
            secret = masks.shared_secret(state.mask_key, state.mask_keys[other])
            words = words + masks.pair_mask(state.client, other, secret, words.size)
    return {MASKED: words}


def send_masked(content: RecordDict, context: Context, request: TrainRequest) -> UploadEncoder:
    """Stage 3: return the function that turns an upload into a masked vector.

    Call this before privacy budget is reserved: it checks that the attempt may train.

    Args:
        content: content of the training request, with the other clients' shares.
        context: Flower's context of the client.
        request: the parsed training request.

    Raises:
        StageError: if an earlier stage is missing or a share is wrong. No budget has been spent
            then, and this attempt cannot train any more.

    Privacy: the vector is uniformly random without knowledge of the masks. The upload is clipped
    and noised before; its (ε, δ) guarantee does not depend on the masks.
    """
    state = _receive_shares(content, context, request)

    def encode(upload: Adapter, start: Adapter) -> Upload:
        masked = _masked_update(state, upload, start)
        # The client's own secrets are no longer needed; other clients hold shares of them.
        spent = replace(state, mask_key=b"", cipher_key=b"", seed=b"")
        replace(spent, stage=MASKED_SENT).save(context)
        return masked

    return encode


def send_unmasked(content: RecordDict, context: Context, request: TrainRequest) -> UploadEncoder:
    """Return the function that leaves an upload unchanged (no secure aggregation)."""
    return lambda upload, start: upload


UPLOAD_ENCODERS = {"none": send_unmasked, "secagg+": send_masked}


def unmask(message: Message, context: Context) -> RecordDict:
    """Stage 4: return one share per client, of the seed or the mask key.

    It is a share of the seed if the client's vector arrived, otherwise of its mask key.

    Raises:
        StageError: if the lists of arrived and lost clients overlap or are incomplete, or too few
            vectors have arrived.

    Privacy: both secrets of a client together would reveal its upload. This client reveals a share
    of one of them, once.
    """
    record = record_of(message.content)
    state = state_after(MASKED_SENT, context, run_and_attempt_of(record))
    replace(state, stage=DONE, seed_shares={}, key_shares={}).save(context)
    arrived, lost = clients_of(record, "arrived"), clients_of(record, "lost")
    check(not set(arrived) & set(lost), "no client may be in both lists, arrived and lost")
    check(
        {*arrived, *lost} == set(state.seed_shares),
        "every client must be in one of the lists arrived and lost",
    )
    check(
        state.client in arrived, "this client has sent its vector and must be in the list arrived"
    )
    enough = len(arrived) >= masks.threshold(len(state.mask_keys))
    check(enough, "too few vectors have arrived")
    given = {client: state.seed_shares[client] for client in arrived}
    given |= {client: state.key_shares[client] for client in lost}
    return reply_of(columns("shares", given))
