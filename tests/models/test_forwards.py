"""Losses, counts, metrics and pixels of every task, each against a plain loop in float64."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from lalora_app.data.encoding import IGNORED, Batch, EncodedSequences
from lalora_app.models.base import language_probe, pixel_probe, text_probe
from lalora_app.models.forwards import (
    _SEE_ALL,
    Pixels,
    attention,
    image_logits,
    masked_mean,
    text_logits,
    timm_logits,
    whole_mask,
)
from lalora_app.models.scores import CLASSIFICATION, LANGUAGE_MODEL, METRICS, accuracies

SEEDS = st.integers(0, 2**32 - 1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normal(rng: np.random.Generator, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(scale * rng.standard_normal(shape))


def surprise(logits: list[float], wanted: int) -> float:
    """-log softmax(logits)[wanted], by the definition."""
    largest = max(logits)
    total = math.fsum(math.exp(value - largest) for value in logits)
    return math.log(total) + largest - logits[wanted]


# --- classification ---------------------------------------------------------------------------


@given(seed=SEEDS, examples=st.integers(1, 9), labels=st.integers(2, 6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_classifiers_losses_and_counts_are_those_of_a_loop(seed, examples, labels):
    rng = np.random.default_rng(seed)
    logits = normal(rng, examples, labels)
    wanted = rng.integers(0, labels, examples).tolist()
    losses = CLASSIFICATION.losses(logits, torch.tensor(wanted))
    assert losses.shape == (examples,)
    expected = [surprise(row, label) for row, label in zip(logits.tolist(), wanted, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-12)

    counts = CLASSIFICATION.count(logits, torch.tensor(wanted))
    said = [max(range(labels), key=row.__getitem__) for row in logits.tolist()]
    pairs = Counter(zip(wanted, said, strict=True))
    assert counts.tolist() == [[pairs[i, j] for j in range(labels)] for i in range(labels)]

    found = CLASSIFICATION.metrics(counts)
    hits = [w == s for w, s in zip(wanted, said, strict=True)]
    each = [
        np.mean([hit for hit, w in zip(hits, wanted, strict=True) if w == label])
        for label in set(wanted)
    ]
    assert found == pytest.approx({"accuracy": np.mean(hits), "balanced_accuracy": np.mean(each)})


def test_counts_of_batches_add_up():
    rng = np.random.default_rng(0)
    logits, labels = normal(rng, 10, 3), torch.arange(10) % 3
    parts = [CLASSIFICATION.count(logits[i], labels[i]) for i in (slice(0, 4), slice(4, 10))]
    whole = CLASSIFICATION.count(logits, labels)
    assert np.array_equal(sum(parts), whole)
    assert CLASSIFICATION.metrics(whole) == accuracies(whole)


def test_a_label_that_nobody_has_does_not_count_in_the_balance():
    found = accuracies(np.array([[3.0, 1, 0], [1, 1, 0], [0, 0, 0]]))
    assert found == {"accuracy": 4 / 6, "balanced_accuracy": (3 / 4 + 1 / 2) / 2}


def test_every_metric_has_its_place_in_the_log():
    rng = np.random.default_rng(0)
    by_class = CLASSIFICATION.count(normal(rng, 4, 2), torch.tensor([0, 1, 0, 1]))
    by_token = LANGUAGE_MODEL.count(normal(rng, 2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]]))
    found = {**CLASSIFICATION.metrics(by_class), **LANGUAGE_MODEL.metrics(by_token)}
    assert set(found) == set(METRICS)
    assert all(type(value) is float for value in found.values())


@given(seed=SEEDS, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_mean_over_tokens_leaves_padding_out(seed, lengths):
    rng = np.random.default_rng(seed)
    logits = normal(rng, len(lengths), max(lengths), 3)
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    found = masked_mean(logits, mask)
    expected = [logits[i, :n].numpy().mean(0) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked_mean(logits[:1, : lengths[0]], None), found[:1])


def test_a_whole_mask_says_the_same_as_a_row_of_it(tiny_model):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits
        ours = model(input_ids=ids, attention_mask=whole_mask(mask)).logits
        alone = text_logits(model, ids[1:2, :3], None)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(alone, theirs[1:2])


SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
OWN_SIZES = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "electra": {"embedding_size": 16},
    "modernbert": {"local_attention": 2, "global_attn_every_n_layers": 2},
    "gpt2": {"bos_token_id": 2, "eos_token_id": 3},
}


def classifier(kind: str):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | OWN_SIZES.get(kind, {}))
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(_SEE_ALL | {"llama", "gpt2", "modernbert"}))
def test_a_gpus_mask_says_what_the_models_own_would(kind):
    """On the CPU, with the mask that a GPU would be given: a decoder must stay one."""
    model = classifier(kind)
    ids = torch.randint(5, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, 7:] = 0
    given = attention(mask.to("meta"), model).ndim
    assert (given == 4) == (kind in _SEE_ALL)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits
        ready = model(input_ids=ids, attention_mask=whole_mask(mask)).logits
    differs = float((ready - theirs).abs().max()) > 1e-6
    assert differs == (kind not in _SEE_ALL)  # so the list is as short as it must be


# --- language models --------------------------------------------------------------------------


def some_texts(rng: np.random.Generator, lengths: list[int], words: int) -> EncodedSequences:
    return EncodedSequences(tuple(tuple(rng.integers(0, words, n).tolist()) for n in lengths))


@given(seed=SEEDS, lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_language_models_losses_and_metrics_are_those_of_a_loop(seed, lengths):
    rng = np.random.default_rng(seed)
    words = 5
    texts = some_texts(rng, lengths, words)
    batch = texts.batch(range(len(lengths)))
    logits = normal(rng, len(lengths), max(lengths), words)
    expected, surprises, right = [], [], 0
    for rows, tokens in zip(logits.tolist(), texts.tokens, strict=True):
        own = [surprise(rows[i], tokens[i + 1]) for i in range(len(tokens) - 1)]
        expected.append(math.fsum(own) / len(own) if own else 0.0)
        surprises += own
        said = [max(range(words), key=row.__getitem__) for row in rows]
        right += sum(said[i] == tokens[i + 1] for i in range(len(tokens) - 1))
    losses = LANGUAGE_MODEL.losses(logits, batch.labels)
    assert losses.shape == (len(lengths),)
    np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-12)

    halves = [LANGUAGE_MODEL.count(logits[i::2], batch.labels[i::2]) for i in (0, 1)]
    found = LANGUAGE_MODEL.metrics(sum(halves))
    n = max(len(surprises), 1)
    perplexity = math.exp(math.fsum(surprises) / n)
    assert found == pytest.approx({"accuracy": right / n, "perplexity": perplexity}, rel=1e-6)


def test_texts_of_one_token_have_no_loss_and_no_gradient():
    for lengths in ([1], [1, 1], [1, 3]):
        batch = some_texts(np.random.default_rng(0), lengths, 5).batch(range(len(lengths)))
        logits = normal(np.random.default_rng(1), len(lengths), max(lengths), 5).requires_grad_()
        losses = LANGUAGE_MODEL.losses(logits, batch.labels)
        losses.sum().backward()
        assert losses[0] == 0
        assert not logits.grad[0].any()
        assert (losses[1:] > 0).tolist() == [n > 1 for n in lengths[1:]]
    only = LANGUAGE_MODEL.count(torch.zeros(2, 1, 5), torch.tensor([[3], [4]]))
    assert LANGUAGE_MODEL.metrics(only) == {"accuracy": 0.0, "perplexity": 1.0}


def test_logits_at_padding_and_at_the_last_token_get_no_gradient():
    batch = some_texts(np.random.default_rng(0), [3, 5], 6).batch([0, 1])
    logits = normal(np.random.default_rng(1), 2, 5, 6).requires_grad_()
    LANGUAGE_MODEL.losses(logits, batch.labels).sum().backward()
    heard = logits.grad.abs().sum(2) > 0
    assert heard.tolist() == [[True, True, False, False, False], [True] * 4 + [False]]
    assert (batch.labels == IGNORED).sum() == 2


# --- pixels -----------------------------------------------------------------------------------


def pictures(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise with edges: white and black blocks beside it, where bicubic overshoots."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    pixels[1, :, : height // 2] = 0
    pixels[1, :, height // 2 :] = 255
    return pixels


class ToUnit:
    """torchvision leaves what bicubic overshoots in a float image."""

    def __call__(self, images):
        return images.clamp(0, 1)


SHAPES = [(20, 20), (20, 33), (47, 21), (9, 9), (9, 31), (64, 65), (17, 16), (16, 17), (24, 24)]


@pytest.mark.parametrize("resize", [16, 18, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_what_torchvision_makes_of_them(shape, resize):
    images = pictures(*shape)
    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(resize, bicubic, antialias=True),
            ToUnit(),
            v2.CenterCrop(16),
            v2.Normalize(MEAN, STD),
        ]
    )
    found = Pixels(resize, 16, MEAN, STD)(images)
    assert found.shape == (2, 3, 16, 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs(images), rtol=1e-5, atol=1e-5)


def test_pixels_of_another_size_overshoot_and_are_brought_back():
    images = pictures(24, 24)
    plain = interpolate(images.float() / 255, (18, 18), mode="bicubic", antialias=True)
    assert plain.max() > 1.001  # what would be no colour
    found = Pixels(18, 18, (0.0,) * 3, (1.0,) * 3)(images)
    assert (found.min(), found.max()) == (0, 1)


@pytest.mark.parametrize("resize", [16, 20])
def test_images_of_the_models_size_are_only_normalised(resize):
    images = pictures(16, 16)
    found = Pixels(resize, 16, MEAN, STD)(images)
    mean, std = (torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in (MEAN, STD))
    expected = (images.double() / 255 - mean) / std
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    untouched = Pixels(resize, 16, (0.0,) * 3, (1.0,) * 3)(images)
    assert torch.equal((untouched * 255).round().to(torch.uint8), images)


def test_an_images_pixels_do_not_depend_on_its_batch():
    images, pixels = pictures(20, 33), Pixels(18, 16, MEAN, STD)
    torch.testing.assert_close(pixels(images)[1:], pixels(images[1:]), rtol=0, atol=0)


def test_image_models_of_both_libraries_get_the_same_pixels():
    pixels, seen = Pixels(18, 16, MEAN, STD), []

    def timm(images):
        seen.append(images)
        return torch.zeros(2, 3)

    def transformers(*, pixel_values):
        return SimpleNamespace(logits=timm(pixel_values))

    images = pictures(20, 20)
    timm_logits(pixels, timm, images, None)
    image_logits(pixels, transformers, images, None)
    assert torch.equal(*seen)
    assert torch.equal(seen[0], pixels(images))


# --- probes -----------------------------------------------------------------------------------


def test_probes_are_like_what_is_trained_on_and_always_the_same():
    words = range(5, 50)
    for make in (lambda: language_probe(words), lambda: pixel_probe(8)):
        one, other = make(), make()
        assert torch.equal(one.inputs, other.inputs)
    language = language_probe(words)
    assert language.mask is None
    assert torch.equal(language.labels, language.inputs)
    assert pixel_probe(8).inputs.dtype == torch.uint8
    assert pixel_probe(8).inputs.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("end", [3, None])
def test_the_last_text_of_a_probe_is_padded_and_every_text_ends_as_it_should(end):
    text = text_probe(range(5, 50), end, pad=0)
    assert isinstance(text, Batch)
    lengths = text.mask.sum(1).tolist()
    assert lengths == [6, 6, 4]
    assert text.labels.shape == (3,)
    for row, length in zip(text.inputs.tolist(), lengths, strict=True):
        assert row[length:] == [0] * (6 - length)
        words = row[:length] if end is None else row[: length - 1]
        assert all(5 <= token < 50 for token in words)
        assert end is None or row[length - 1] == end
