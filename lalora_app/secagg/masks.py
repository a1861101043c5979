"""Cryptographic functions of the protocol: key agreement, secret sharing and masks.

Shares have Flower's format (`shamir.py`). Keys and masks are not Flower's. Its keys, on the curve
P-384, take twenty times as long as X25519. Its ``pseudo_rand_gen`` reduces the seed to 32 bits,
which a server can search exhaustively, and expands it by a Mersenne Twister. Here a mask is the
ChaCha20 stream of a 256-bit key, and every key is used for one mask only.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lalora_app.privacy.randomness import key_stream
from lalora_app.secagg import shamir
from lalora_app.shared_noise.lattice import Words
from lalora_app.shared_noise.shares import Cohort
from lalora_app.wire.tensors import WireError

SEED_BYTES = 32
KEY_BYTES = 32  # of a key of X25519, private or public
_FIELD = 2**255 - 19  # the size of its field
_DOMAIN = b"LaLoRA, secret of two clients, version 1"


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
    """Return a new private key of 32 bytes, from the operating system's randomness."""
    return X25519PrivateKey.generate().private_bytes_raw()


def _private(key: bytes) -> X25519PrivateKey:
    try:
        return X25519PrivateKey.from_private_bytes(key)
    except ValueError as error:
        raise WireError(f"a private key must have {KEY_BYTES} bytes") from error


def public_key_of(key: bytes) -> bytes:
    """Return the public key of a private key, 32 bytes.

    Raises:
        WireError: if ``key`` does not have 32 bytes.
    """
    return _private(key).public_key().public_bytes_raw()


def _agreed(own: X25519PrivateKey, public: bytes) -> bytes:
    """Return the X25519 result of one private key and another client's public key."""
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD:
        raise WireError("a public key must be a number below 2^255 - 19, in 32 bytes")
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of low order gives 0 with every private key
        raise WireError("a public key must not be a point of low order") from error


def check_public_keys(publics: Iterable[bytes]) -> None:
    """Check that a secret can be agreed on with each of some public keys.

    Raises:
        WireError: if one is not a valid public key of X25519.
    """
    own = X25519PrivateKey.generate()
    for public in publics:
        _agreed(own, public)


def shared_secrets(key: bytes, publics: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return the secret of each pair of one client and another (X25519, RFC 7748).

    A secret is HKDF-SHA256 of the X25519 result and of both public keys. Two different public keys
    can give the same result, if they differ by a point of low order; with the public keys in it,
    pairs with different keys have different secrets.

    Args:
        key: private key of the one client.
        publics: public key per other client.

    Returns:
        32 bytes per other client, as URL-safe base64. The other client computes the same.

    Raises:
        WireError: if the private key does not have 32 bytes, or a public key is not valid.
    """
    own = _private(key)
    mine = own.public_key().public_bytes_raw()
    return {
        other: _derived(_agreed(own, public), sorted((mine, public)))
        for other, public in publics.items()
    }


def _derived(agreed: bytes, publics: Sequence[bytes]) -> bytes:
    kdf = HKDF(SHA256(), KEY_BYTES, salt=None, info=b"".join((_DOMAIN, *publics)))
    return base64.urlsafe_b64encode(kdf.derive(agreed))


def split_into_shares(
    parts: Sequence[bytes], clients: Iterable[int], needed: int
) -> dict[int, list[bytes]]:
    """Split secrets into Shamir shares; ``needed`` shares of one reconstruct it.

    Args:
        parts: the secrets.
        clients: the clients that will hold shares.
        needed: number of shares that reconstruct a secret.

    Returns:
        Per client one share of each secret, in the order of ``parts``.
    """
    order = sorted(clients)
    return dict(zip(order, shamir.split(parts, needed, len(order)), strict=True))


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
