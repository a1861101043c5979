"""The client's stage with a model: check the shares, train, and send the update plus masks."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from cryptography.fernet import InvalidToken
from flwr.app import Context, RecordDict
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate

from lalora_app.adapter.factors import Adapter
from lalora_app.secagg import fixed_point, masks
from lalora_app.secagg.client_state import (
    MASKED_SENT,
    SHARED,
    ClientState,
    check,
    close,
    state_after,
)
from lalora_app.secagg.messages import MASKED, SECAGG, StageError, mapping_of, record_of
from lalora_app.wire.messages import TrainRequest

Upload = Mapping[str, np.ndarray]
UploadEncoder = Callable[[Adapter, Adapter], Upload]


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

    The saved state is deleted first, so that this attempt cannot train a second time.
    """
    state = state_after(SHARED, context, (request.run, request.attempt))
    close(state, context)
    encrypted = mapping_of(record_of(content, SECAGG), "shares")
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
    words = words + masks.mask(state.seed, words)
    for other in state.seed_shares:
        if other != state.client:
            secret = masks.shared_secret(state.mask_key, state.mask_keys[other])
            words = words + masks.pair_mask(state.client, other, secret, words)
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
