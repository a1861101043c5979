"""The client's stage with a model: check the shares, train, and send the update plus masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
    record_name,
    state_after,
)
from lalora_app.secagg.messages import MASKED, SECAGG, StageError, mapping_of, record_of
from lalora_app.secagg.noise_seeds import SHARE_BYTES
from lalora_app.shared_noise.lattice import Words
from lalora_app.wire.messages import TrainRequest

Upload = Mapping[str, np.ndarray]
UploadEncoder = Callable[[Adapter, Adapter], Upload]


def _decrypted_shares(
    state: ClientState, source: int, secret: bytes, encrypted: bytes
) -> tuple[bytes, ...]:
    """Decrypt the shares that client ``source`` sent: of its seed, its noise seeds, its mask key.

    Raises:
        StageError: if the shares do not decrypt, belong to another pair of clients or another
            directory of keys, or are shares of another number of noise seeds.
    """
    try:
        plain = decrypt(secret, encrypted)
    except InvalidToken as error:
        raise StageError("a share cannot be decrypted") from error
    sender, receiver, seeds, key_share = share_keys_plaintext_separate(plain)
    check(
        (sender, receiver) == (source, state.client),
        "a share must name its sender and this client as receiver",
    )
    number = 1 + (state.cohort.removable if state.cohort else 0)
    end = number * SHARE_BYTES
    check(len(seeds) == end + len(state.directory), f"there must be shares of {number} seeds")
    check(seeds[end:] == state.directory, "all clients must have the same directory of keys")
    check(len(key_share) == SHARE_BYTES, "there must be a share of the mask key")
    return seeds[:SHARE_BYTES], seeds[SHARE_BYTES:end], key_share


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
    check(
        encrypted.keys() <= state.cipher_keys.keys(),
        "shares must come from a client with public keys",
    )
    sources = {source: state.cipher_keys[source] for source in encrypted}
    opened = {
        source: _decrypted_shares(state, source, secret, encrypted[source])
        for source, secret in masks.shared_secrets(state.cipher_key, sources).items()
    }
    check(len(opened) + 1 >= state.threshold, "too few clients have shared their secrets")
    seeds, noise, keys = ({c: shares[i] for c, shares in opened.items()} for i in range(3))
    return replace(
        state,
        seed_shares=state.seed_shares | seeds,
        noise_shares=state.noise_shares | noise,
        key_shares=state.key_shares | keys,
    )


@dataclass(frozen=True)
class OpenAttempt:
    """An attempt in which this client may send one masked vector.

    Attributes:
        state: the client's state, with the shares of the other clients.
        context: Flower's context of the client.
    """

    state: ClientState
    context: Context

    @property
    def clients(self) -> int:
        """The number of clients with public keys."""
        return len(self.state.mask_keys)

    @property
    def colluding(self) -> int | None:
        """The number c that the server gave for shared noise; None without it."""
        return self.state.colluding if self.state.cohort else None

    @property
    def noise_seeds(self) -> tuple[bytes, ...]:
        """The seeds of this client's noise, by component; none without shared noise."""
        return tuple(self.state.noise_seeds.values())

    def masked(self, words: Words, context: bytes = b"") -> Upload:
        """Return a vector plus the client's own mask and one mask per other client.

        Args:
            words: 32-bit or 64-bit words, the client's vector modulo 2^w.
            context: what all clients must agree in beside the directory of keys.

        Raises:
            StageError: if this attempt has masked a vector before.

        Privacy: the result is uniformly random without knowledge of the masks, which are used once.
        """
        state, records = self.state, self.context.state.config_records
        check(record_name(state.attempt) not in records, "an attempt masks one vector")
        whole = state.directory + context
        masked = words + masks.mask(state.seed, words)
        others = {o: state.mask_keys[o] for o in state.seed_shares if o != state.client}
        for other, secret in masks.shared_secrets(state.mask_key, others).items():
            masked = masked + masks.pair_mask(state.client, other, secret, words, whole)
        # The client's own secrets are no longer needed; other clients hold shares of them.
        spent = replace(state, mask_key=b"", cipher_key=b"", seed=b"", noise_seeds={})
        replace(spent, stage=MASKED_SENT).save(self.context)
        return {MASKED: masked}


def open_attempt(content: RecordDict, context: Context, request: TrainRequest) -> OpenAttempt:
    """Return the attempt of a training request, after checking that it may train.

    Call this before privacy budget is reserved.

    Args:
        content: content of the training request, with the other clients' shares.
        context: Flower's context of the client.
        request: the parsed training request.

    Raises:
        StageError: if an earlier stage is missing or a share is wrong. No budget has been spent
            then, and this attempt cannot train any more.
    """
    return OpenAttempt(_receive_shares(content, context, request), context)


def send_masked(content: RecordDict, context: Context, request: TrainRequest) -> UploadEncoder:
    """Return the function that turns an upload with its own noise into a masked vector.

    Args:
        content: content of the training request, with the other clients' shares.
        context: Flower's context of the client.
        request: the parsed training request.

    Raises:
        StageError: as :func:`open_attempt`, or if the attempt is one of shared noise.

    Privacy: the upload is clipped and noised before; its (ε, δ) guarantee does not depend on the
    masks.
    """
    attempt = open_attempt(content, context, request)
    check(attempt.colluding is None, "this run has no shared noise")

    def encode(upload: Adapter, start: Adapter) -> Upload:
        update = fixed_point.update_of(upload, start)
        return attempt.masked(fixed_point.quantise(update, attempt.clients))

    return encode


def send_unmasked(content: RecordDict, context: Context, request: TrainRequest) -> UploadEncoder:
    """Return the function that leaves an upload unchanged (no secure aggregation)."""
    return lambda upload, start: upload


UPLOAD_ENCODERS = {"none": send_unmasked, "secagg+": send_masked}
