"""Rounded Gaussian noise drawn from seeds: who has the seed can draw the same integers again.

A component of a client's noise is round(N(0, v)) per entry. Its words are the ChaCha20 stream of a
256-bit seed, and its normals follow from them by the Box-Muller formula, two from each 128 bits.
Entry j depends on its own words only. So if two machines disagree in the last bit of a logarithm,
an entry differs by one lattice unit at most, about once in 2^52/√v entries, and all others are
equal. A method that rejects some of its draws, as numpy's normals do, would go out of step.

The seed of component 0 is never revealed. Those of the removable components 1 … J are a chain:
s_{k+1} = SHA-256(s_k). So one seed s_{j+1} reveals all components from j + 1, and no other.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lalora_app.privacy.randomness import key_stream
from lalora_app.shared_noise.lattice import Lattice, Words, to_words
from lalora_app.shared_noise.shares import Cohort

Integers = NDArray[np.int64]
SEED_BYTES = 32


def _chain(seed: bytes, seeds: int) -> Iterator[bytes]:
    """Yield ``seeds`` seeds of a chain, from a given one."""
    for _ in range(seeds):
        yield seed
        seed = hashlib.sha256(seed).digest()


def new_seeds(
    cohort: Cohort, draw: Callable[[int], bytes] = secrets.token_bytes
) -> tuple[bytes, ...]:
    """Return the secret seeds of one upload: that of component 0, then the chain s_1 … s_J.

    Args:
        cohort: the clients of the attempt.
        draw: (number of bytes) -> random bytes; an audit, which has no secrets, draws them again.
    """
    needed, first = (draw(SEED_BYTES) for _ in range(2))
    return (needed, *_chain(first, cohort.removable))


def commitment(seed: bytes, number: int, cohort: Cohort) -> bytes:
    """Return SHA-256 of s_J, computed from s_number; equal for all seeds of one chain.

    Privacy: it tells nothing of s_J to whoever cannot invert SHA-256.
    """
    *_, last = _chain(seed, cohort.removable - number + 1)
    return hashlib.sha256(last).digest()


def _uniform(seed: bytes, pairs: int) -> NDArray[np.float64]:
    """Return (2, pairs) numbers in (0, 1], with 53 bits and down to 2^-65."""
    words = np.frombuffer(key_stream(seed, 16 * pairs), "<u8").reshape(pairs, 2)
    return (words.T.astype(np.float64) + 0.5) * 2.0**-64


def rounded_gaussian(seed: bytes, std: float, size: int) -> Integers:
    """Return (size,) integers round(N(0, std²)): (√(-2 ln u)·cos 2πv, √(-2 ln u)·sin 2πv)·std.

    Args:
        seed: 32 bytes, the key of the stream.
        std: standard deviation before rounding, in lattice units. Limit: 0 gives zeros.
        size: number of entries.

    Raises:
        ValueError: if the seed does not have 32 bytes.

    Privacy: noise only against those who do not have the seed. No entry exceeds 9.5·std; a normal
    number does with chance 3e-20.
    """
    radius, angle = _uniform(seed, -(-size // 2))
    radius = np.sqrt(-2 * np.log(radius)) * std
    angle = angle * (2 * math.pi)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    rounded: Integers = np.rint(normals.ravel()[:size]).astype(np.int64)
    return rounded


def component(seed: bytes, number: int, lattice: Lattice) -> Integers:
    """Return (d,) integers: one component of a client's noise, of variance fraction·σ²."""
    fraction = lattice.constants.cohort.fractions[number]
    return rounded_gaussian(
        seed, lattice.noise_std * math.sqrt(fraction), lattice.constants.entries
    )


def share(seeds: Sequence[bytes], lattice: Lattice) -> Integers:
    """Return (d,) integers: all noise that a client adds to its upload, in lattice units.

    Args:
        seeds: one per component, from :func:`new_seeds`.
        lattice: the integers of the run.

    Raises:
        ValueError: if there are not as many different seeds as components.

    Privacy: one share alone is not the promised noise; only the sum of the counted shares is.
    """
    needed = len(lattice.constants.cohort.fractions)
    if len(seeds) != needed or len(set(seeds)) != needed:
        raise ValueError(f"the noise of a client needs {needed} different seeds")
    total = np.zeros(lattice.constants.entries, np.int64)
    for number, seed in enumerate(seeds):
        total += component(seed, number, lattice)
    return total


def without_excess(
    total: Words, revealed: Mapping[int, bytes], missing: int, lattice: Lattice
) -> Words:
    """Return the sum of uploads less the components that nobody needs.

    Args:
        total: (d,), the sum of uploads modulo 2^w.
        revealed: the seed s_{j+1} of each client whose upload is in the sum; the noise of a client
            without an entry stays whole.
        missing: D, the clients whose upload is not in the sum.
        lattice: the integers of the run.

    Raises:
        ValueError: if too few clients are in the sum, or two of them have the same seed.

    Limit: with as many missing as possible nothing is superfluous, and no seed changes the sum.

    Privacy: the noise left over has at least the variance ``sum_fraction``·σ², of which the counted
    shares have at least σ². Who reveals seeds must answer once for an upload.
    """
    cohort = lattice.constants.cohort
    first = cohort.needed(missing) + 1
    if len(set(revealed.values())) < len(revealed):
        raise ValueError("a seed is revealed twice")
    rest = total.copy()
    for seed in revealed.values():
        for number, known in enumerate(_chain(seed, cohort.removable - first + 1), first):
            rest -= to_words(component(known, number, lattice), lattice.word)
    return rest
