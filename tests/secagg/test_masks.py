"""Test keys, masks and shares of secrets."""

import contextlib
import secrets

import numpy as np
import pytest

from lalora_app.secagg import masks
from lalora_app.wire.tensors import WireError

LIKE = np.zeros(1000, np.uint32)
WORDS = [np.uint32, np.uint64]


@pytest.mark.parametrize("word", WORDS)
def test_what_two_clients_add_for_each_other_cancels(word):
    one, other = masks.new_private_key(), masks.new_private_key()
    secret = masks.shared_secret(one, masks.public_key_of(other))
    assert secret == masks.shared_secret(other, masks.public_key_of(one))
    like = np.zeros(999, word)
    total = masks.pair_mask(3, 8, secret, like) + masks.pair_mask(8, 3, secret, like)
    assert total.dtype == word
    assert not total.any()


def test_the_mask_of_a_pair_depends_on_its_numbers_and_the_context():
    """A public key that another client copied gives the same secret; the masks must differ."""
    secret = masks.shared_secret(
        masks.new_private_key(), masks.public_key_of(masks.new_private_key())
    )
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
    shares = masks.split_into_shares(secret, range(clients), needed)
    assert 2 <= needed <= clients < 2 * needed
    last = dict(list(shares.items())[-needed:])
    assert masks.reconstruct_secret(last, needed) == secret
    with pytest.raises(WireError, match="too few"):
        masks.reconstruct_secret(dict(list(shares.items())[1:needed]), needed)
    forged = last | {clients - 1: b"\xff" * len(shares[0])}
    with contextlib.suppress(WireError):
        assert masks.reconstruct_secret(forged, needed) != secret


@pytest.mark.parametrize("junk", [b"", b"junk", masks.public_key_of(masks.new_private_key())[:-40]])
def test_a_public_key_that_is_none_is_told(junk):
    with pytest.raises(WireError, match="P-384"):
        masks.shared_secret(masks.new_private_key(), junk)
