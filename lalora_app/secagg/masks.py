"""Cryptographic functions of the protocol: key agreement, secret sharing and masks.

Keys use Flower's functions, and `shamir.py` makes shares in Flower's format. Masks do not: Flower's
``pseudo_rand_gen`` reduces the seed to 32 bits, which a server can search exhaustively, and expands
it by a Mersenne Twister. Here a mask is the ChaCha20 stream of a 256-bit key, and every key is used
for one mask only.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)

from lalora_app.privacy.randomness import key_stream
from lalora_app.secagg import shamir
from lalora_app.shared_noise.lattice import Words
from lalora_app.shared_noise.shares import Cohort
from lalora_app.wire.tensors import WireError

SEED_BYTES = 32
KEY_BYTES = 48  # size of a private key on the curve P-384, which Flower uses


def threshold(clients: int, colluding: int | None = None) -> int:
    """Return the number of shares that reconstruct a secret: two thirds of the clients, at least 2.

    Up to a third of the clients may drop out. Every client has two secrets, and another client
    reveals a share of only one of them. A server that wants both secrets needs
    ``2·threshold - clients`` clients that break the protocol.

    Args:
        clients: number of clients with public keys.
        colluding: c of a run with shared noise, whose threshold may be larger; None without it.

    Raises:
        ConfigError: if c is not from 0 to ``clients - 2``.
    """
    if colluding is not None:
        return Cohort.of(clients, colluding).threshold
    return max(2, -(-2 * clients // 3))


def new_private_key() -> bytes:
    """Return a new private key of 48 bytes; as a PEM file it would have about 300 bytes."""
    numbers = generate_key_pairs()[0].private_numbers()
    return numbers.private_value.to_bytes(KEY_BYTES, "big")


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(key, "big"), ec.SECP384R1())


def public_key_of(key: bytes) -> bytes:
    """Return the public key of a private key, as PEM.

    Raises:
        WireError: if ``key`` is not a private key of the curve P-384.
    """
    try:
        return public_key_to_bytes(_private(key).public_key())
    except ValueError as error:
        raise WireError("a private key must be a number below the order of P-384") from error


def shared_secret(key: bytes, public: bytes) -> bytes:
    """Return the shared secret of two clients (elliptic-curve Diffie-Hellman).

    Args:
        key: private key of one client.
        public: public key of the other client, as PEM.

    Raises:
        WireError: if ``public`` is not a public key of the curve P-384.
    """
    try:
        return generate_shared_key(_private(key), bytes_to_public_key(public))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise WireError("a public key must be a point on P-384, as PEM") from error


def split_into_shares(secret: bytes, clients: Iterable[int], needed: int) -> dict[int, bytes]:
    """Split a secret into one Shamir share per client; ``needed`` shares reconstruct it."""
    order = sorted(clients)
    shares = shamir.split(secret, needed, len(order))
    return dict(zip(order, shares, strict=True))


def reconstruct_secret(shares: Mapping[int, bytes], needed: int) -> bytes:
    """Return a secret from enough of its shares.

    Args:
        shares: share per client that held it.
        needed: number of shares that it takes.

    Raises:
        WireError: if there are too few shares, or they belong to different secrets.
    """
    if len(shares) < needed:
        raise WireError(f"{len(shares)} shares of a secret are too few: it takes {needed}")
    try:
        return shamir.combine([shares[client] for client in sorted(shares)][:needed])
    except ValueError as error:
        raise WireError("the shares of a secret do not fit together") from error


def mask(key: bytes, like: Words) -> Words:
    """Return uniform words: the ChaCha20 stream of ``key``, which is used once.

    Args:
        key: 32 bytes.
        like: a vector of 32-bit or 64-bit words, for size and type.
    """
    words = np.empty_like(like)
    words[:] = np.frombuffer(key_stream(key, like.nbytes), like.dtype.newbyteorder("<"))
    return words


def reconstruct_seed(shares: Mapping[int, bytes], needed: int) -> bytes:
    """Return a seed of 32 bytes from enough of its shares.

    Raises:
        WireError: as :func:`reconstruct_secret`, or if it has another length.
    """
    seed = reconstruct_secret(shares, needed)
    if len(seed) != SEED_BYTES:
        raise WireError(f"a reconstructed seed must have {SEED_BYTES} bytes")
    return seed


def pair_mask(own: int, other: int, secret: bytes, like: Words, context: bytes = b"") -> Words:
    """Return the mask of a pair of clients, as added by the client ``own``.

    The other client adds the negative of it, so the masks cancel in the sum. The key is SHA-256 of
    the secret, both numbers and the context. So two pairs with one secret have different masks,
    and clients that disagree in the context have masks that do not cancel.

    Args:
        own: number of the client that adds the mask.
        other: number of the other client.
        secret: shared secret of the two clients.
        like: a vector of 32-bit or 64-bit words, for size and type.
        context: what both clients must agree in.
    """
    numbers = (number.to_bytes(8, "big") for number in sorted((own, other)))
    key = hashlib.sha256(b"".join((base64.urlsafe_b64decode(secret), *numbers, context))).digest()
    words = mask(key, like)
    return words if own < other else np.negative(words)
