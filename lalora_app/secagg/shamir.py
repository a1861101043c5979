"""Shamir's secret sharing over GF(2^128), in the format of Flower's shares.

pycryptodome, which Flower calls, multiplies one pair of field elements at a time: rebuilding one
secret of 100 clients takes seconds. Here all blocks of a secret are lanes of one large integer.
Field and format are the same, and the tests combine the shares of one by the other.
"""

import secrets
from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import accumulate, compress, pairwise

from cryptography.hazmat.primitives.padding import PKCS7

_BITS = 128  # of a field element
_BYTES, _INDEX = _BITS // 8, 4  # of a block, and of the number at the start of a share
_LANE = 2 * _BITS  # an element, with room for its product by a small number
_FEEDBACK = (0, 1, 2, 7)  # x^128 = 1 + x + x^2 + x^7
_MODULUS = 1 << _BITS | sum(1 << power for power in _FEEDBACK)


def _lanes(blocks: bytes) -> int:
    """Return blocks of 16 bytes as one integer with a lane per block."""
    wide = (blocks[i : i + _BYTES].rjust(_LANE // 8, b"\0") for i in range(0, len(blocks), _BYTES))
    return int.from_bytes(b"".join(wide), "big")


def _blocks(lanes: int, count: int) -> bytes:
    """Return the blocks of an integer of ``count`` lanes."""
    wide = lanes.to_bytes(count * _LANE // 8, "big")
    return b"".join(wide[i + _BYTES : i + 2 * _BYTES] for i in range(0, len(wide), 2 * _BYTES))


def _lowest(bits: int, count: int) -> int:
    """Return a mask of the lowest bits of each lane."""
    return _lanes(((1 << bits) - 1).to_bytes(_BYTES, "big") * count)


def _times(lanes: int, factor: int, low: int) -> int:
    """Multiply the element in each lane by a small number, below 2^16."""
    product = 0
    for bit in range(factor.bit_length()):
        if factor >> bit & 1:
            product ^= lanes << bit
    high = (product >> _BITS) & low
    product &= low
    for power in _FEEDBACK:
        product ^= high << power
    return product


def _product(a: int, b: int) -> int:
    """Return the product of two elements; only public numbers are multiplied so."""
    found = 0
    while b:
        found ^= a if b & 1 else 0
        a = a << 1 ^ (_MODULUS if a >> (_BITS - 1) else 0)
        b >>= 1
    return found


def _inverse(a: int) -> int:
    """Return 1/a = a^(2^128 - 2)."""
    found = 1
    for _ in range(_BITS - 1):
        a = _product(a, a)
        found = _product(found, a)
    return found


@lru_cache(maxsize=64)
def _weights(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the Lagrange weights with which the shares of these numbers give the value at 0.

    l_j = Π_{m≠j} x_m / (x_m + x_j).
    """
    found = []
    for own in numbers:
        others = [other for other in numbers if other != own]
        below = reduce(_product, (own ^ other for other in others), 1)
        found.append(_product(reduce(_product, others, 1), _inverse(below)))
    return tuple(found)


def _padded(secret: bytes) -> bytes:
    """Return a secret with its padding, as whole blocks."""
    padder = PKCS7(_BITS).padder()
    return padder.update(secret) + padder.finalize()


def split(parts: Sequence[bytes], needed: int, count: int) -> list[list[bytes]]:
    """Split each of several secrets into ``count`` shares, any ``needed`` of which give it back.

    Each block c_0 of a padded secret has a random polynomial c_0 + c_1·x + … of degree
    ``needed`` - 1 over GF(2^128), and the share of number x is its value there
    (Shamir, 1979, https://doi.org/10.1145/359168.359176). The blocks of all secrets are computed at
    once, which takes little more time than those of one.

    Args:
        parts: the secrets, any bytes; each is padded to blocks of 16.
        needed: number of shares that give a secret back, at least 1.
        count: number of shares of each, at least ``needed``.

    Returns:
        Entry i has one share of each secret: the number i + 1, as 4 bytes, and one block per block
        of the secret.

    Limit: with ``needed`` = 1 every share holds its secret.

    Privacy: fewer shares than ``needed`` tell nothing about a secret, even to someone who knows all
    shares of the other secrets.
    """
    padded = [_padded(secret) for secret in parts]
    ends = list(accumulate(map(len, padded), initial=0))
    blocks = ends[-1] // _BYTES
    coefficients = [_lanes(secrets.token_bytes(ends[-1])) for _ in range(needed - 1)]
    low, constant = _lowest(_BITS, blocks), _lanes(b"".join(padded))
    shares = []
    for number in range(1, count + 1):
        value = 0
        for coefficient in (*coefficients, constant):  # Horner's rule
            value = _times(value, number, low) ^ coefficient
        prefix, joined = number.to_bytes(_INDEX, "little"), _blocks(value, blocks)
        shares.append([prefix + joined[start:end] for start, end in pairwise(ends)])
    return shares


def _numbers(shares: Sequence[bytes]) -> tuple[int, ...]:
    """Return the numbers of shares that fit together."""
    sizes = {len(share) for share in shares}
    if len(sizes) != 1 or min(sizes) <= _INDEX or (min(sizes) - _INDEX) % _BYTES:
        raise ValueError("shares must have whole blocks, and one length")
    numbers = tuple(int.from_bytes(share[:_INDEX], "little") for share in shares)
    if len(set(numbers)) != len(numbers) or not all(0 < x < 1 << 16 for x in numbers):
        raise ValueError("shares must have different numbers, from 1")
    return numbers


def combine(shares: Sequence[bytes]) -> bytes:
    """Return the secret of as many shares as it needs: Σ l_j·y_j.

    Args:
        shares: shares of different numbers, as :func:`split` makes them.

    Raises:
        ValueError: if the shares do not fit together.
    """
    weights, values = _weights(_numbers(shares)), [_lanes(share[_INDEX:]) for share in shares]
    blocks = len(shares[0]) // _BYTES
    low, total = _lowest(_BITS, blocks), 0
    for bit in reversed(range(_BITS)):  # of all weights at once
        total = _times(total, 2, low)
        for value in compress(values, (weight >> bit & 1 for weight in weights)):
            total ^= value
    unpadder = PKCS7(_BITS).unpadder()
    return unpadder.update(_blocks(total, blocks)) + unpadder.finalize()
