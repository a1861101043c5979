"""Keys, shares and masks: Flower's primitives, and a stream cipher for the masks themselves.

Flower's own ``pseudo_rand_gen`` folds its seed to 32 bits, which a server can try one by one, and
expands it by a Mersenne Twister. A mask here is the ChaCha20 stream of the whole 256-bit key; no
key is ever used for a second mask.
"""

import base64
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)

from lalora_app.secagg.fixed_point import Words
from lalora_app.wire.tensors import WireError

KEY_BYTES = 48  # of a private key on Flower's curve, P-384


def threshold(clients: int) -> int:
    """Return how many shares make a secret: two thirds, so that a third may drop out.

    A client gives the server one share of two secrets of another client, never both. So that both
    are made all the same, ``2·threshold - clients`` clients must lie with the server.
    """
    return max(2, -(-2 * clients // 3))


def new_private_key() -> bytes:
    """Return a fresh private key: 48 bytes, where a PEM file would be 300 to share."""
    numbers = generate_key_pairs()[0].private_numbers()
    return numbers.private_value.to_bytes(KEY_BYTES, "big")


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(key, "big"), ec.SECP384R1())


def public_key_of(key: bytes) -> bytes:
    """Return the public key of a private one, as PEM.

    Raises:
        WireError: if it is no private key of this curve.
    """
    try:
        return public_key_to_bytes(_private(key).public_key())
    except ValueError as error:
        raise WireError("a private key must be a number below the order of P-384") from error


def shared_secret(key: bytes, public: bytes) -> bytes:
    """Return the secret of two clients, from one's private and the other's public key.

    Raises:
        WireError: if the public key is none of this curve.
    """
    try:
        return generate_shared_key(_private(key), bytes_to_public_key(public))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise WireError("a public key must be a point on P-384, as PEM") from error


def split_into_shares(secret: bytes, clients: Iterable[int]) -> dict[int, bytes]:
    """Return a share of the secret for every client; :func:`threshold` of them make it again."""
    order = sorted(clients)
    shares = create_shares(secret, threshold(len(order)), len(order))
    return dict(zip(order, shares, strict=True))


def reconstruct_secret(shares: Mapping[int, bytes], clients: int) -> bytes:
    """Return a secret from enough of its shares.

    Args:
        shares: by the client that held them.
        clients: how many shares were made.

    Raises:
        WireError: if they are too few or do not fit together.
    """
    needed = threshold(clients)
    if len(shares) < needed:
        raise WireError(f"{len(shares)} shares of a secret are too few: it takes {needed}")
    try:
        return combine_shares([shares[client] for client in sorted(shares)][:needed])
    except (ValueError, IndexError) as error:
        raise WireError("the shares of a secret do not fit together") from error


def mask(key: bytes, size: int) -> Words:
    """Return ``size`` uniform 32-bit words: the ChaCha20 stream of a key that masks once only."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * size)), "<u4").astype(np.uint32)


def pair_mask(own: int, other: int, secret: bytes, size: int) -> Words:
    """Return what client ``own`` adds for ``other``: the negative of what that one adds for it."""
    words = mask(base64.urlsafe_b64decode(secret), size)
    return words if own < other else np.negative(words)
