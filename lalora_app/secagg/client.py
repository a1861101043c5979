"""The client's stages of the protocol that need no model; an attempt has four, in this order.

* :func:`advertise_keys`: create two key pairs and send their public keys.
* :func:`share_secrets`: split the secrets into shares, encrypted for the others.
* `upload.py`: after training, send the update plus masks.
* :func:`unmask`: send one share per client, with which the server removes the masks of the sum.

A stage out of order raises `StageError`. So no attempt trains twice, no mask is used for two
vectors, and no client reveals shares of both secrets of another client. Stages of different
attempts do not depend on each other.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, Context
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

from lalora_app.secagg import masks, noise_seeds
from lalora_app.secagg.client_state import (
    ADVERTISED,
    MASKED_SENT,
    SHARED,
    ClientState,
    begin,
    check,
    close,
    state_after,
)
from lalora_app.secagg.messages import (
    ADVERTISE,
    MOST_CLIENTS,
    SHARE,
    UNMASK,
    Value,
    clients_of,
    columns,
    mapping_of,
    reply_of,
    run_and_attempt_of,
)
from lalora_app.shared_noise import seeded
from lalora_app.wire.messages import count_of


def advertise_keys(record: ConfigRecord, context: Context) -> ConfigRecord:
    """Stage 1: start an attempt with new keys and return the public keys.

    Raises:
        StageError: if this client began to train in this attempt or in a later one.
    """
    state = ClientState(
        ADVERTISED,
        *run_and_attempt_of(record),
        client=count_of(record, "client", 0),
        mask_key=masks.new_private_key(),
        cipher_key=masks.new_private_key(),
    )
    begin(state, context)
    public = (masks.public_key_of(key) for key in (state.mask_key, state.cipher_key))
    return reply_of(dict(zip(("mask-key", "cipher-key"), public, strict=True)))


def _with_public_keys(state: ClientState, record: ConfigRecord) -> ClientState:
    """Return the state with the public keys of all clients.

    Raises:
        StageError: if this client's own keys are missing, a key occurs twice, or there are fewer
            than two clients or more than ``MOST_CLIENTS``, for all of which it would make shares.
        WireError: if no secret can be agreed on with a public key.
    """
    mask_keys, cipher_keys = mapping_of(record, "mask-keys"), mapping_of(record, "cipher-keys")
    check(set(mask_keys) == set(cipher_keys), "every client must have a mask key and a cipher key")
    check(
        len(mask_keys) >= 2, "there must be at least 2 clients: a sum of one upload is that upload"
    )
    check(len(mask_keys) <= MOST_CLIENTS, f"there must be at most {MOST_CLIENTS} clients")
    keys = [*mask_keys.values(), *cipher_keys.values()]
    check(len(set(keys)) == len(keys), "every public key must be different")
    masks.check_public_keys(keys)  # before training spends budget
    for own, found in ((state.mask_key, mask_keys), (state.cipher_key, cipher_keys)):
        check(
            found.get(state.client) == masks.public_key_of(own),
            "this client's own public keys must be among the keys",
        )
    return replace(
        state,
        mask_keys=mask_keys,
        cipher_keys=cipher_keys,
        identities=_given(record, "identities"),
        signatures=_given(record, "signatures"),
    )


def _given(record: ConfigRecord, name: str) -> dict[int, bytes]:
    """Read a mapping {client: bytes} that a run without signing keys does not have."""
    return mapping_of(record, name) if name in record else {}


def _with_secrets(state: ClientState) -> ClientState:
    """Return the state with the seeds of mask and noise, and everybody's shares of all secrets."""
    seed = secrets.token_bytes(32)
    seeds = seeded.new_seeds(state.cohort) if state.cohort else ()
    parts = (seed, state.mask_key, *seeds[1:])
    shares = masks.split_into_shares(parts, state.mask_keys, state.threshold)
    return replace(
        state,
        seed=seed,
        noise_seeds=dict(enumerate(seeds)),
        seed_shares={client: held[0] for client, held in shares.items()},
        key_shares={client: held[1] for client, held in shares.items()},
        noise_shares={client: b"".join(held[2:]) for client, held in shares.items()},
    )


def _encrypted(state: ClientState, other: int, key: bytes) -> bytes:
    """Return the shares that another client will hold, encrypted for it."""
    seeds = state.seed_shares[other] + state.noise_shares[other] + state.directory
    plain = share_keys_plaintext_concat(state.client, other, seeds, state.key_shares[other])
    return encrypt(key, plain)


def share_secrets(record: ConfigRecord, context: Context) -> ConfigRecord:
    """Stage 2: split the secrets into shares, each encrypted for the client that will hold it.

    The secrets are the mask seed, the mask key, and with shared noise the seeds of the removable
    noise. The reply contains a commitment to the seeds (SHA-256), so that the server can detect a
    seed that was reconstructed from wrong shares.

    Raises:
        StageError: if the stage before is missing or the public keys are not acceptable.
        ConfigError: if so many clients may collude that no noise is left to count on.
    """
    state = _with_public_keys(state_after(ADVERTISED, context, run_and_attempt_of(record)), record)
    if "colluding" in record:
        state = replace(state, colluding=count_of(record, "colluding", 0))
    state = _with_secrets(state)
    own = state.client
    others = {other: key for other, key in state.cipher_keys.items() if other != own}
    keys = masks.shared_secrets(state.cipher_key, others)
    encrypted = {other: _encrypted(state, other, key) for other, key in keys.items()}
    replace(
        state,
        stage=SHARED,
        seed_shares={own: state.seed_shares[own]},
        key_shares={own: state.key_shares[own]},
        noise_shares={own: state.noise_shares[own]},
    ).save(context)
    committed: dict[str, Value] = {
        "seed": hashlib.sha256(state.seed).digest(),
        "noise": noise_seeds.commitment(list(state.noise_seeds.values())),
    }
    return reply_of(columns("shares", encrypted) | committed)


def _noise_given(state: ClientState, arrived: Sequence[int]) -> dict[int, bytes]:
    """Return a share of s_{j+1} per client whose vector arrived; nothing if all noise is needed."""
    if state.cohort is None:
        return {}
    number = state.cohort.needed(len(state.mask_keys) - len(arrived)) + 1
    if number > state.cohort.removable:
        return {}
    return {c: noise_seeds.share_of(state.noise_shares[c], number) for c in arrived}


def unmask(record: ConfigRecord, context: Context) -> ConfigRecord:
    """Stage 4: return one share per client, of the seed or the mask key.

    It is a share of the seed if the client's vector arrived, otherwise of its mask key. With shared
    noise, each client whose vector arrived has one share more, of a seed of its superfluous noise.

    Raises:
        StageError: if the lists of arrived and lost clients overlap or are incomplete, or too few
            vectors have arrived.

    Privacy: both secrets of a client together would reveal its upload. This client reveals a share
    of one of them, once. It decides which noise is superfluous by its own count of missing clients.
    """
    state = state_after(MASKED_SENT, context, run_and_attempt_of(record))
    close(state, context)  # first: an attempt has one answer, also if it is a refusal
    arrived, lost = clients_of(record, "arrived"), clients_of(record, "lost")
    check(not set(arrived) & set(lost), "no client may be in both lists, arrived and lost")
    check(
        {*arrived, *lost} == set(state.seed_shares),
        "every client must be in one of the lists arrived and lost",
    )
    check(
        state.client in arrived, "this client has sent its vector and must be in the list arrived"
    )
    check(len(arrived) >= state.threshold, "too few vectors have arrived")
    given = {client: state.seed_shares[client] for client in arrived}
    given |= {client: state.key_shares[client] for client in lost}
    return reply_of(columns("shares", given) | columns("noise", _noise_given(state, arrived)))


# In the order of the attempts in one message: the present attempt comes first.
STAGES = {UNMASK: unmask, SHARE: share_secrets, ADVERTISE: advertise_keys}
