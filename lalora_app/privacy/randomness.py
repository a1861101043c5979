"""Random streams: noise and Poisson sampling, secret by default.

The secure streams use numpy's Philox with a key of 128 random bits. torch's CPU generator uses only
32 bits of its seed, and an attacker can try all of them.
"""

import hashlib
import secrets

import numpy as np


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
