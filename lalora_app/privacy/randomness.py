"""Random streams: noise and Poisson sampling, secret by default.

The secure streams use numpy's Philox with a key of 128 random bits. torch's CPU generator uses only
32 bits of its seed, and an attacker can try all of them.
"""

import hashlib
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms


def seed_of(seed: int, *purpose: str | int) -> int:
    """Derive an independent 128-bit seed for a named purpose; equal arguments, equal seeds."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")


def seeded(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a repeatable stream. Privacy: anyone with the seed can subtract the noise."""
    return np.random.Generator(np.random.Philox(key=seed_of(seed, *purpose)))


def secure() -> np.random.Generator:
    """Return a stream with a 128-bit key of the operating system; the key is not stored."""
    return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))


def key_stream(key: bytes, size: int) -> bytes:
    """Return ``size`` bytes of the ChaCha20 stream of a 256-bit key.

    Args:
        key: 32 bytes, used for one stream only.
        size: number of bytes. Limit: a shorter stream is the beginning of a longer one.

    Raises:
        ValueError: if the key does not have 32 bytes.

    Privacy: uniform to whoever does not have the key.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return stream.update(bytes(size))
