"""Secret sharing against Flower's functions, which call pycryptodome."""

import math

import pytest
from Crypto.Protocol.SecretSharing import _Element
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.secagg import shamir

BLOCK, NUMBER = 16, 4


def _shares(parts, needed, count):
    """Return the shares of each secret."""
    return list(zip(*shamir.split(parts, needed, count), strict=True))


@st.composite
def cases(draw):
    """A secret, the shares that it needs, their number, and the positions that are there."""
    count = draw(st.integers(1, 12))
    needed = draw(st.integers(1, count))
    there = draw(st.permutations(range(count)))[:needed]
    return draw(st.binary(max_size=70)), needed, count, there


@given(cases())
@settings(deadline=None, max_examples=60)
def test_any_shares_that_are_enough_give_the_secret_back(case):
    secret, needed, count, there = case
    (*_, shares) = _shares([b"another", bytes(40), secret], needed, count)
    assert shamir.combine([shares[i] for i in there]) == secret
    assert combine_shares([shares[i] for i in there]) == secret  # Flower's


@given(cases())
@settings(deadline=None, max_examples=60)
def test_shares_of_flower_are_combined(case):
    secret, needed, count, there = case
    shares = create_shares(secret, needed, count)
    assert shamir.combine([shares[i] for i in there]) == secret


@given(st.integers(1, 2**128 - 1), st.integers(0, 2**128 - 1))
@settings(deadline=None)
def test_products_and_inverses_are_those_of_pycryptodome(a, b):
    assert shamir._product(a, b) == int(_Element(a) * _Element(b))
    assert shamir._inverse(a) == int(_Element(a).inverse())


@given(st.lists(st.integers(0, 2**128 - 1), min_size=1, max_size=4), st.integers(0, 2**16 - 1))
@settings(deadline=None)
def test_lanes_do_not_touch_each_other(elements, factor):
    packed = shamir._lanes(b"".join(x.to_bytes(BLOCK, "big") for x in elements))
    low = shamir._lowest(128, len(elements))
    found = shamir._blocks(shamir._times(packed, factor, low), len(elements))
    expected = [int(_Element(x) * _Element(factor)) for x in elements]
    assert found == b"".join(x.to_bytes(BLOCK, "big") for x in expected)


def test_each_split_draws_new_coefficients():
    needed, count = 3, 5
    seen = [shares for _ in range(10) for shares in _shares([bytes(32)] * 2, needed, count)]
    values = [share[NUMBER:] for shares in seen for share in shares]
    assert len(set(values)) == len(values)
    padded = bytes(32) + b"\x10" * BLOCK
    blocks = [
        int.from_bytes(value[i : i + BLOCK], "big") ^ int.from_bytes(padded[i : i + BLOCK], "big")
        for value in values
        for i in range(0, len(padded), BLOCK)
    ]
    assert len(set(blocks)) == len(blocks), "every block must have a polynomial of its own"
    bits = sum(int.from_bytes(value, "big").bit_count() for value in values)
    number = 8 * sum(map(len, values))
    assert abs(bits - number / 2) < 5 * math.sqrt(number) / 2  # of equal secrets of zeros


def opened(shares):
    """Return what some shares give, or nothing if the padding is wrong."""
    try:
        return shamir.combine(shares)
    except ValueError:
        return None


@pytest.mark.parametrize("needed", range(2, 6))
def test_fewer_shares_than_needed_do_not_give_the_secret(needed):
    secret = bytes(range(32))
    (shares,) = _shares([secret], needed, 7)
    assert all(opened(shares[:held]) != secret for held in range(1, needed))
    assert opened(shares[:needed]) == secret


@given(st.binary(max_size=BLOCK - 1), st.binary(max_size=BLOCK - 1), st.integers(2, 8))
@settings(deadline=None)
def test_one_share_fewer_fits_to_every_secret(secret, other, needed):
    """For any other secret there is a last share with which the same shares give it."""
    [(*shares, last)] = _shares([secret], needed, needed)
    weights = shamir._weights(tuple(range(1, needed + 1)))
    known = 0
    for weight, share in zip(weights, shares, strict=False):
        known ^= shamir._product(weight, int.from_bytes(share[NUMBER:], "big"))
    gap = BLOCK - len(other)
    wanted = int.from_bytes(other + bytes([gap]) * gap, "big")  # padded as PKCS7 does
    forged = shamir._product(known ^ wanted, shamir._inverse(weights[-1]))
    assert shamir.combine([*shares, last[:NUMBER] + forged.to_bytes(BLOCK, "big")]) == other


@pytest.mark.parametrize(
    "shares",
    [
        [],
        [b"\1\0\0\0"],
        [b"\1\0\0\0" + bytes(15)],
        [b"\0\0\0\0" + bytes(16)],
        [b"\1\0\0\0" + bytes(16)] * 2,
        [b"\1\0\0\0" + bytes(16), b"\2\0\0\0" + bytes(32)],
        [b"\1\0\1\0" + bytes(16)],
        [b"\1\0\0\0" + bytes(16)],  # no padding
    ],
)
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares|padding"):
        shamir.combine(shares)
