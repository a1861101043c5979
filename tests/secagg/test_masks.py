"""Test keys, masks and shares of secrets."""

import base64
import contextlib
import hmac
import secrets

import numpy as np
import pytest

from lalora_app.secagg import masks
from lalora_app.wire.tensors import WireError

LIKE = np.zeros(1000, np.uint32)
WORDS = [np.uint32, np.uint64]


def pair_secret(one, other):
    """Return the secret of two private keys, by the first of them."""
    return masks.shared_secrets(one, {7: masks.public_key_of(other)})[7]


@pytest.mark.parametrize("word", WORDS)
def test_what_two_clients_add_for_each_other_cancels(word):
    one, other = masks.new_private_key(), masks.new_private_key()
    secret = pair_secret(one, other)
    assert secret == pair_secret(other, one)
    like = np.zeros(999, word)
    total = masks.pair_mask(3, 8, secret, like) + masks.pair_mask(8, 3, secret, like)
    assert total.dtype == word
    assert not total.any()


def test_the_mask_of_a_pair_depends_on_its_numbers_and_the_context():
    """A public key that another client copied gives the same secret; the masks must differ."""
    secret = pair_secret(masks.new_private_key(), masks.new_private_key())
    found = [
        masks.pair_mask(*pair, secret, LIKE, context)
        for pair, context in (((1, 2), b""), ((1, 3), b""), ((2, 3), b""), ((1, 2), b"round 2"))
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one == other).mean() < 0.01
            assert (one == np.negative(other)).mean() < 0.01


@pytest.mark.parametrize("word", WORDS)
def test_every_bit_of_a_mask_is_uniform(word):
    drawn = masks.mask(secrets.token_bytes(32), np.zeros(4096, word))
    bits = np.unpackbits(drawn.view(np.uint8).reshape(4096, -1), axis=1).mean(axis=0)
    assert bits.size == 8 * np.dtype(word).itemsize
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(4096)


def test_a_mask_depends_on_all_of_its_key():
    """Flower's own generator folds its seed to 32 bits: swapped words give the same mask."""
    key = secrets.token_bytes(32)
    swapped = key[4:8] + key[:4] + key[8:]
    alike = masks.mask(key, LIKE) == masks.mask(swapped, LIKE)
    assert alike.mean() < 0.01
    for bit in range(256):
        flipped = (int.from_bytes(key, "big") ^ 1 << bit).to_bytes(32, "big")
        assert (masks.mask(key, LIKE[:8]) != masks.mask(flipped, LIKE[:8])).any()


@pytest.mark.parametrize("clients", [2, 3, 4, 7])
def test_a_secret_takes_its_threshold_of_shares(clients):
    secret = secrets.token_bytes(masks.KEY_BYTES)
    needed = masks.threshold(clients)
    held = masks.split_into_shares([secret, bytes(32)], range(clients), needed)
    shares = {client: first for client, (first, _) in held.items()}
    assert 2 <= needed <= clients < 2 * needed
    last = dict(list(shares.items())[-needed:])
    assert masks.reconstruct_secret(last, needed) == secret
    with pytest.raises(WireError, match="too few"):
        masks.reconstruct_secret(dict(list(shares.items())[1:needed]), needed)
    forged = last | {clients - 1: b"\xff" * len(shares[0])}
    with contextlib.suppress(WireError):
        assert masks.reconstruct_secret(forged, needed) != secret


def ladder(key, public):
    """Multiply a point by a private key: RFC 7748, section 5, in plain integers."""
    size = 2**255 - 19
    scalar = int.from_bytes(key, "little") & ~7 & ~(1 << 255) | 1 << 254
    point = int.from_bytes(public, "little")
    x2, z2, x3, z3 = 1, 0, point, 1
    for bit in reversed(range(255)):
        one = scalar >> bit & 1
        if one:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = (d * a + c * b) ** 2 % size, point * (d * a - c * b) ** 2 % size
        e = a * a - b * b
        x2, z2 = a * a * b * b % size, e * (a * a + 121665 * e) % size
        if one:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, size) % size).to_bytes(32, "little")


def test_two_clients_agree_on_the_secret_of_the_definition():
    nine = (9).to_bytes(32, "little")
    known = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert ladder(nine, nine).hex() == known  # RFC 7748, section 5.2
    one, other = masks.new_private_key(), masks.new_private_key()
    publics = [masks.public_key_of(key) for key in (one, other)]
    assert publics == [ladder(key, nine) for key in (one, other)]
    first = hmac.digest(bytes(32), ladder(one, publics[1]), "sha256")  # HKDF, RFC 5869
    info = b"LaLoRA, secret of two clients, version 1" + b"".join(sorted(publics))
    expected = hmac.digest(first, info + b"\1", "sha256")
    assert base64.urlsafe_b64decode(pair_secret(one, other)) == expected


def test_two_public_keys_with_one_result_have_two_secrets():
    """The points u and 1/u differ by the point of order 2, which a private key takes to 0."""
    key, public = masks.new_private_key(), masks.public_key_of(masks.new_private_key())
    inverse = pow(int.from_bytes(public, "little"), -1, 2**255 - 19).to_bytes(32, "little")
    assert ladder(key, public) == ladder(key, inverse)
    one, other = masks.shared_secrets(key, {1: public, 2: inverse}).values()
    assert one != other


SIZE, LOW = r"below 2\^255 - 19, in 32 bytes", "low order"
JUNK = {
    "empty": (b"", SIZE),
    "too short": (masks.public_key_of(masks.new_private_key())[:-1], SIZE),
    "as PEM": (b"-----BEGIN PUBLIC KEY-----", SIZE),
    "9 plus the size of the field": ((2**255 - 19 + 9).to_bytes(32, "little"), SIZE),
    "9 with the highest bit set": ((9 | 1 << 255).to_bytes(32, "little"), SIZE),
    "0": (bytes(32), LOW),
    "1": ((1).to_bytes(32, "little"), LOW),
}


@pytest.mark.parametrize(("junk", "told"), JUNK.values(), ids=JUNK)
def test_a_public_key_that_is_not_valid_is_told(junk, told):
    with pytest.raises(WireError, match=told):
        masks.shared_secrets(masks.new_private_key(), {1: junk})


def test_a_private_key_of_another_size_is_told():
    with pytest.raises(WireError, match="a private key must have 32 bytes"):
        masks.public_key_of(bytes(48))
