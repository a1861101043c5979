"""Examples as tensors: padded and masked right, images cut as torchvision cuts them."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from transformers import BertTokenizerFast

from conftest import WORDS, one_line
from lalora_app.data.encoding import (
    IGNORED,
    EncodedImages,
    EncodedSequences,
    EncodedTexts,
    encode_sequences,
    encode_texts,
    padded_width,
)
from lalora_app.data.examples import Examples
from lalora_app.data.images import encode_images

ID = {word: i for i, word in enumerate(WORDS)}
CLS, SEP, PAD = ID["[CLS]"], ID["[SEP]"], ID["[PAD]"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("words") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS), "utf-8")
    return BertTokenizerFast(str(vocabulary))


def ids(text: str) -> tuple[int, ...]:
    return tuple(ID[word] for word in text.split())


# --- batches of texts -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded():
    tokens = ((5, 6, 7), (1,), (2, 3), (9, 9, 9, 9, 9), (4, 4))
    return EncodedTexts(tokens, (0, 1, 0, 1, 1), pad=99)


def test_a_batch_is_padded_to_its_longest_and_masked(encoded):
    batch = encoded.batch([2, 0, 1])
    assert batch.inputs.tolist() == [[2, 3, 99], [5, 6, 7], [1, 99, 99]]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [0, 0, 1]
    assert {batch.inputs.dtype, batch.mask.dtype, batch.labels.dtype} == {torch.long}
    assert encoded.batch(np.array([1])).inputs.tolist() == [[1]]


def test_a_pad_token_in_a_text_is_not_masked():
    batch = EncodedTexts(((99, 5, 99), (1,)), (0, 0), pad=99).batch([0, 1])
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_sequence_is_its_own_label_and_padding_has_none():
    sequences = EncodedSequences(((5, 0, 6), (1,), (0, 0)))
    batch = sequences.batch([0, 1, 2])
    assert batch.inputs.tolist() == [[5, 0, 6], [1, 0, 0], [0, 0, 0]]
    none = IGNORED
    assert batch.labels.tolist() == [[5, 0, 6], [1, none, none], [0, 0, none]]
    assert batch.mask is None
    assert (len(sequences), sequences.length(0)) == (3, 3)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_batches_yield_every_example_once(encoded, size):
    batches = list(encoded.batches(size))
    assert all(len(b.labels) <= size for b in batches)
    assert len(batches) <= len(encoded) // size + 2  # a part of each width may be left over
    rows = [
        (tuple(ids[mask.bool()].tolist()), int(label))
        for b in batches
        for ids, mask, label in zip(b.inputs, b.mask, b.labels, strict=True)
    ]
    assert sorted(rows) == sorted(zip(encoded.tokens, encoded.labels, strict=True))
    widths = [b.inputs.shape[1] for b in batches]
    assert widths == sorted(widths)


@given(
    lengths=st.lists(st.integers(1, 37), min_size=1, max_size=12),
    size=st.integers(1, 5),
    shortest=st.integers(1, 50),
)
@pytest.mark.parametrize("kind", [EncodedTexts, EncodedSequences])
def test_how_far_a_text_is_padded_follows_from_it_alone(kind, lengths, size, shortest):
    """Privacy: a server's weights can make padding matter, and then it must not be another's."""
    tokens = tuple((1,) * n for n in lengths)
    more = (tokens, (0,) * len(tokens), 0) if kind is EncodedTexts else (tokens,)
    examples = kind(*more, longest=37, shortest=shortest)
    for batch in examples.micro_batches(range(len(tokens)), size):
        for row in batch.inputs:
            assert len(row) == padded_width(int((row == 1).sum()), 37, shortest)


def test_texts_are_padded_to_a_power_of_two_and_never_beyond_the_longest():
    widths = {n: padded_width(n, 37) for n in range(1, 38)}
    assert sorted(set(widths.values())) == [8, 16, 32, 37]
    assert all(n <= width for n, width in widths.items())
    assert all(width < 2 * n for n, width in widths.items() if n > 8)


@pytest.mark.parametrize(
    ("shortest", "widths"), [(1, [1, 2, 4, 8, 16, 32, 37]), (20, [20, 32, 37]), (64, [37])]
)
def test_texts_are_padded_to_the_shortest_width_at_least(shortest, widths):
    assert sorted({padded_width(n, 37, shortest) for n in range(1, 38)}) == widths


@pytest.mark.parametrize(
    "examples",
    [
        EncodedTexts(((1, 2), (3,)), (0, 1), pad=0),
        EncodedSequences(((1, 2), (3,))),
        EncodedImages.of_one_size(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (0, 1)),
    ],
    ids=lambda examples: type(examples).__name__,
)
def test_a_batch_that_sampling_left_empty_has_no_parts(examples):
    assert list(examples.micro_batches(np.array([], dtype=np.int64), 4)) == []
    assert len(list(examples.micro_batches(np.array([1]), 4))) == 1
    assert len(examples) == 2


# --- texts to tokens --------------------------------------------------------------------------


def test_encode_cuts_at_max_length(tokenizer):
    examples = Examples(("free prize", "hello dear friend see you later"), (1, 0))
    got = encode_texts(examples, tokenizer, 5)
    assert got.tokens == ((CLS, *ids("free prize"), SEP), (CLS, *ids("hello dear friend"), SEP))
    assert (got.labels, got.pad, len(got)) == ((1, 0), PAD, 2)
    assert encode_sequences(examples, tokenizer, 5).tokens == got.tokens


def test_texts_that_fill_the_length_are_counted(tokenizer):
    texts = ("ok", "free prize now", "hello dear friend see you later")
    examples = Examples(texts, (0, 1, 0))
    for encode in (encode_texts, encode_sequences):
        assert [encode(examples, tokenizer, length).full() for length in (5, 8, 9)] == [2, 1, 0]


def test_a_pair_is_one_text_with_a_separator_cut_at_its_longer_side(tokenizer):
    examples = Examples((("free prize", "ok"), ("ok", "call now hello dear friend")), (0, 1))
    whole = encode_texts(examples, tokenizer, 16)
    assert whole.tokens[0] == (CLS, *ids("free prize"), SEP, *ids("ok"), SEP)
    cut = encode_texts(examples, tokenizer, 7)
    assert cut.tokens[1] == (CLS, *ids("ok"), SEP, *ids("call now hello"), SEP)


def test_the_same_texts_are_encoded_once(tokenizer):
    examples = Examples(("ok", "see you"), (0, 1))
    again = Examples(("ok", "see you"), (0, 1))
    assert encode_texts(examples, tokenizer, 8) is encode_texts(again, tokenizer, 8)
    assert encode_texts(examples, tokenizer, 8) is not encode_texts(again, tokenizer, 9)


def test_no_texts_at_all_are_no_tokens(tokenizer):
    assert len(encode_texts(Examples((), ()), tokenizer, 8)) == 0


@pytest.mark.parametrize("encode", [encode_texts, encode_sequences])
def test_a_text_without_a_token_is_one_line(encode):
    def by_letters(texts, **options):
        return {"input_ids": [[ord(c) for c in text if c.isalpha()] for text in texts]}

    examples = Examples(("words", "...", "more"), (0, 1, 0), rows=(3, 14, 15))
    with one_line("data.input-column", "the text of row 14 has no token"):
        encode(examples, by_letters, 8)


@pytest.mark.parametrize("encode", [encode_texts, encode_sequences])
def test_images_for_a_text_model_are_one_line(encode, tokenizer):
    with one_line("data.input-column", "must hold texts for this model.task, not images"):
        encode(Examples((png(),), (0,)), tokenizer, 8)


# --- images -----------------------------------------------------------------------------------


def noise(width: int = 7, height: int = 7, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int = 7, height: int = 7, seed: int = 0) -> bytes:
    return stored(Image.fromarray(noise(width, height, seed=seed)))


def encode(*files: bytes, resize: int = 10, size: int = 6) -> EncodedImages:
    return encode_images(Examples(files, (0,) * len(files)), resize, size)


def kept(images: EncodedImages, index: int) -> torch.Tensor:
    """The (3, height, width) of one image."""
    return images.batch([index]).inputs[0]


@pytest.mark.parametrize("side", [4, 6, 10])
def test_squares_that_would_only_be_made_larger_stay_as_stored(side):
    got = encode(png(side, side, 1), png(side, side, 2))
    (stack,) = got.stacks
    assert stack.dtype == torch.uint8
    assert stack.is_contiguous()
    for pixels, seed in zip(stack, (1, 2), strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0), noise(side, side, seed=seed))


def test_a_batch_of_images_has_the_pixels_and_labels_of_its_rows():
    files = tuple(png(seed=i) for i in range(4))
    got = encode_images(Examples(files, (0, 1, 2, 3)), 10, 6)
    batch = got.batch([2, 0])
    assert torch.equal(batch.inputs, got.stacks[0][[2, 0]])
    assert (batch.mask, batch.labels.tolist()) == (None, [2, 0])
    assert torch.equal(got.batch(np.array([3])).inputs, got.stacks[0][3:])
    assert [len(b.labels) for b in got.batches(3)] == [3, 1]
    assert len(got) == 4


def test_no_images_at_all_are_no_pixels():
    assert (len(encode()), encode().stacks) == (0, ())


SHAPES = [(9, 7), (7, 12), (6, 6), (5, 5), (31, 8), (101, 33), (6, 4)]


def test_what_an_image_becomes_follows_from_it_alone():
    """Privacy: one image of another size must not change what the others are trained as."""
    files = [png(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    together = encode(*files)
    for i, file in enumerate(files):
        assert torch.equal(kept(together, i), kept(encode(file), 0))
    batches = list(together.micro_batches(range(len(files)), 4))
    assert sorted(len(batch.labels) for batch in batches) == [1, 2, 4]  # no two sizes in one


@pytest.mark.parametrize("resize", [6, 10, 11])
@pytest.mark.parametrize("shape", [*SHAPES, (13, 13)])
def test_other_images_are_cut_as_torchvision_cuts_them(shape, resize):
    file = png(*shape)
    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.Compose([v2.Resize(resize, bicubic), v2.CenterCrop(6), v2.PILToTensor()])
    if shape[0] != shape[1] or shape[0] > resize:
        found = kept(encode(file, resize=resize, size=6), 0)
        assert torch.equal(found, theirs(Image.open(io.BytesIO(file))))


def of_mode(mode: str) -> tuple[bytes, np.ndarray]:
    """A file of the mode, and the (height, width, 3) that it means."""
    if mode == "L":
        gray = noise(channels=1)[..., 0]
        return stored(Image.fromarray(gray)), np.stack([gray] * 3, axis=-1)
    if mode == "RGBA":
        return stored(Image.fromarray(noise(channels=4))), noise(channels=4)[..., :3]
    if mode == "16 bits":
        gray = np.random.default_rng(0).integers(0, 2**16, (7, 7)).astype(np.uint16)
        return stored(Image.fromarray(gray)), np.stack(
            [np.rint(gray / 257).astype(np.uint8)] * 3, -1
        )
    if mode == "P":  # two colours, named by a table of them
        indices = noise(channels=1)[..., 0] % 2
        image = Image.fromarray(indices).convert("P")
        image.putpalette([255, 0, 0, 0, 128, 7])
        return stored(image), np.array([[255, 0, 0], [0, 128, 7]], np.uint8)[indices]
    bits = noise(channels=1)[..., 0] % 2
    return stored(Image.fromarray(bits.astype(bool))), np.stack([255 * bits] * 3, -1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "16 bits"])
def test_every_kind_of_picture_becomes_three_colours(mode):
    file, expected = of_mode(mode)
    (pixels,) = encode(file).stacks[0]
    assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_gray_and_coloured_pictures_of_one_size_are_one_set():
    got = encode(png(7, 7), of_mode("L")[0])
    assert [stack.shape for stack in got.stacks] == [(2, 3, 7, 7)]


JPEG = stored(Image.fromarray(noise(64, 64)), "JPEG")
BROKEN = {
    "text": b"this is no picture",
    "nothing": b"",
    "a truncated JPEG": JPEG[: len(JPEG) // 2],
    "a header only": JPEG[:20],
    "a truncated PNG": png(64, 64)[:500],
    "a damaged PPM": b"P6 9q9 2\n255\n" + bytes(99),  # PIL raises a plain ValueError
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_an_unreadable_image_is_one_line(case):
    examples = Examples((png(), BROKEN[case]), (0, 0), rows=(5, 7))
    with one_line("data.input-column", ": row 7 is no readable image"):
        encode_images(examples, 10, 6)


def test_a_picture_that_would_fill_the_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with one_line("data.input-column", ": row 0 is no readable image"):
        encode(png(30, 30, seed=9))


@pytest.mark.parametrize("content", ["a text", ("one", "two")])
def test_texts_for_an_image_model_are_one_line(content):
    with one_line("data.input-column", "must hold images for this model.task, not texts"):
        encode_images(Examples((content,), (0,)), 10, 6)


def test_an_image_is_decoded_once(monkeypatch):
    files = (png(seed=77),)
    first = encode(*files)
    monkeypatch.setattr("lalora_app.data.images.decoded", SimpleNamespace)  # not called again
    assert encode(*files) is first
