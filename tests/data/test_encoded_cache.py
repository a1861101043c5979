"""The cache of encoded examples: bounded in bytes, keyed by a fingerprint, without raw data."""

import gc
import io
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lalora_app.data import encoding, images
from lalora_app.data.encoded_cache import EncodedCache
from lalora_app.data.encoding import EncodedImages, EncodedTexts, encode_sequences, encode_texts
from lalora_app.data.examples import Examples
from lalora_app.data.images import encode_images

LENGTH = 8


class Tokenizer:
    """One token per word; counts its calls."""

    pad_token_id = 0

    def __init__(self):
        self.calls = 0

    def __call__(self, texts, **options):
        self.calls += 1
        return {"input_ids": [[len(word) + 300 for word in text.split()] for text in texts]}


class Once(tuple):
    """Contents that count how often they are gone through."""

    __slots__ = ()
    passes = 0

    def __iter__(self):
        type(self).passes += 1
        return super().__iter__()


def texts(client: int, count: int = 20) -> Examples:
    return Examples(tuple(f"text {client} number {i}" for i in range(count)), (0,) * count)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Value:
    name: int
    size: int

    def size_in_bytes(self) -> int:
        return self.size


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 120)), max_size=60),
)
def test_the_kept_bytes_never_exceed_the_limit_and_the_newest_stay(limit, requests):
    cache = EncodedCache[Value](limit)
    kept: list[Value] = []  # the plain route: a list in the order of use
    for name, size in requests:
        known = [value for value in kept if value.name == name]
        expected = known[0] if known else Value(name, size)
        found = cache.get(name, lambda name=name, size=size: Value(name, size))
        assert found == expected
        assert not known or found is known[0]
        if found.size <= limit:
            kept = [value for value in kept if value.name != name] + [found]
            while sum(value.size for value in kept) > limit:
                kept.pop(0)
        assert cache.size_in_bytes() == sum(value.size for value in kept) <= limit


@pytest.mark.parametrize(
    ("encode", "cache"), [(encode_texts, "_TEXTS"), (encode_sequences, "_SEQUENCES")]
)
def test_many_clients_stay_within_a_small_bound(encode, cache, monkeypatch):
    one = encode(texts(0), Tokenizer(), LENGTH).size_in_bytes()
    small = EncodedCache(5 * one)
    monkeypatch.setattr(encoding, cache, small)
    tokenizer = Tokenizer()
    for client in range(40):
        encode(texts(client), tokenizer, LENGTH)
        assert small.size_in_bytes() <= 5 * one
    assert tokenizer.calls == 40
    for client in range(35, 40):  # the last five are kept
        encode(texts(client), tokenizer, LENGTH)
    assert tokenizer.calls == 40
    encode(texts(0), tokenizer, LENGTH)
    assert tokenizer.calls == 41


def test_images_stay_within_a_small_bound(monkeypatch):
    small = EncodedCache[EncodedImages](2000)
    monkeypatch.setattr(images, "_IMAGES", small)
    for client in range(20):
        encode_images(Examples((png(client), png(client + 100)), (0, 1)), 10, 6)
        assert 0 < small.size_in_bytes() <= 2000


def test_a_repeated_call_neither_encodes_nor_hashes_again():
    examples = texts(1)
    counted = Examples(Once(examples.contents), examples.labels)
    tokenizer = Tokenizer()
    first = encode_texts(counted, tokenizer, LENGTH)
    Once.passes = 0
    for _ in range(3):
        assert encode_texts(counted, tokenizer, LENGTH) is first
    assert (tokenizer.calls, Once.passes) == (1, 0)


@pytest.mark.parametrize("kind", ["texts", "sequences", "images"])
def test_no_raw_examples_are_kept_alive(kind):
    tokenizer = Tokenizer()
    if kind == "images":
        examples = Examples((png(1), png(2)), (0, 1))
        encoded = encode_images(examples, 10, 6)
    else:
        encode = encode_texts if kind == "texts" else encode_sequences
        examples = texts(2)
        encoded = encode(examples, tokenizer, LENGTH)
    gone = weakref.ref(examples)
    del examples
    gc.collect()
    assert gone() is None
    assert len(encoded) > 0


def test_the_size_of_encoded_texts_is_that_of_their_objects():
    import sys

    rows = tuple(tuple(1000 + i for i in range(width)) for width in range(1, 200))
    found = EncodedTexts(rows, (0,) * len(rows), 0).size_in_bytes()
    real = sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row)) for row in rows)
    assert found == pytest.approx(real, rel=0.05)


ALIKE = [
    (("a b",), ("a", "b")),
    ((("a", "b"),), ("a", "b")),
    ((("a\0b", "c"),), (("a", "b\0c"),)),
    (("ab", "c"), ("a", "bc")),
    ((b"a",), ("a",)),
    ((b"1 str 1 2",), (b"1", b"2")),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=str)
def test_contents_that_look_alike_have_different_fingerprints(one, other):
    pair = [Examples(contents, (0,) * len(contents)) for contents in (one, other)]
    assert pair[0].fingerprint != pair[1].fingerprint


def test_labels_are_part_of_the_fingerprint_and_rows_are_not():
    one = Examples(("a", "b"), (0, 1))
    assert one.fingerprint != Examples(("a", "b"), (0, 0)).fingerprint
    assert one.fingerprint == Examples(("a", "b"), (0, 1), rows=(5, 6)).fingerprint
    assert Examples(("\ud800",), (0,)).fingerprint  # a text that is no UTF-8
