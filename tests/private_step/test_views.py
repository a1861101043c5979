"""Random views of images: their pixels, and one clip per image whatever the number of its views."""

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from helpers.oracle import joint, randomise, trained, without_engine
from lalora_app.adapter.factors import kind
from lalora_app.blocks.adapters import wire_name
from lalora_app.client.local_round import LocalSettings, run_round
from lalora_app.data.encoding import Batch, EncodedImages
from lalora_app.methods.learning_rates import learning_rates
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import Backbone, _build, build
from lalora_app.models.forwards import Pixels
from lalora_app.models.scores import CLASSIFICATION, mean_over_views
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.mechanism import CLIP_MARGIN, CLIPPINGS, poisson_batch
from lalora_app.private_step.step import RandomStreams, private_gradient
from lalora_app.private_step.views import InViews, in_views, private_views

EXAMPLES, SIDE = 6, 16
Grads = dict[str, Tensor]


def some_images(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def batch_of(images: Tensor) -> Batch:
    return Batch(images, None, torch.arange(len(images)) % 2)


# The pixels of a view.


def reflected(place: int, side: int) -> int:
    """The pixel at a place of an image that goes on as in a mirror at both ends."""
    if place < 0:
        return -place
    return 2 * (side - 1) - place if place >= side else place


def plain_view(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A view pixel by pixel: the image is shifted first, then mirrored."""
    _, height, width = image.shape
    shift = [
        math.floor(u * (2 * (side // 8) + 1)) - side // 8
        for u, side in zip(numbers[1:], (height, width), strict=True)
    ]
    view = np.empty_like(image)
    for y, x in product(range(height), range(width)):
        column = width - 1 - x if numbers[0] < 0.5 else x
        row, column = reflected(y + shift[0], height), reflected(column + shift[1], width)
        view[:, y, x] = image[:, row, column]
    return view


@given(
    sides=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    count=st.integers(1, 3),
    views=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_view_is_the_image_shifted_with_a_mirror_at_its_ends(sides, count, views, seed):
    images = some_images(count, *sides, seed)
    drawn = np.random.default_rng(seed).random((count, views, 3))
    found = in_views(batch_of(images), drawn)
    assert found.views == views
    assert torch.equal(found.labels, batch_of(images).labels)
    for row, (i, j) in enumerate(product(range(count), range(views))):
        expected = plain_view(images[i].numpy(), drawn[i, j])
        assert np.array_equal(found.inputs[row].numpy(), expected)


def test_the_numbers_in_the_middle_show_the_image_itself():
    images = some_images(2)
    still, turned = np.full((2, 1, 3), 0.5), np.full((2, 1, 3), [0.49, 0.5, 0.5])
    assert torch.equal(in_views(batch_of(images), still).inputs, images)
    assert torch.equal(in_views(batch_of(images), turned).inputs, images.flip(3))


def test_small_images_are_only_mirrored():
    images = some_images(1, 7, 7)
    drawn = np.random.default_rng(0).random((1, 50, 3))
    kinds = {view.numpy().tobytes() for view in in_views(batch_of(images), drawn).inputs}
    assert kinds == {images.numpy().tobytes(), images.flip(3).numpy().tobytes()}


def test_every_shift_is_as_frequent_as_any_other_and_half_of_the_views_are_mirrored():
    marked = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    marked[0, :, 8, 7], marked[0, :, 8, 8] = 100, 200  # of a row, and left of the other
    data = EncodedImages.of_one_size(marked, (0,))
    (batch,) = InViews(data, 6000, seeded(0, "views")).micro_batches([0], 1)
    first, second = (
        (batch.inputs[:, 0] == value).flatten(1).int().argmax(1) for value in (100, 200)
    )
    mirrored = second < first
    rows, columns = first // SIDE - 8, torch.where(mirrored, SIDE - 1 - first % SIDE, first % SIDE)
    seen = Counter(zip(mirrored.tolist(), rows.tolist(), (columns - 7).tolist(), strict=True))
    assert set(seen) == set(product((False, True), range(-2, 3), range(-2, 3)))
    assert stats.chisquare(list(seen.values())).pvalue > 0.001


# The views of a batch.


def shown(data: InViews, indices: list[int], size: int) -> dict[int, bytes]:
    """The views of each image; a label is an image's index here."""
    views = {}
    for batch in data.micro_batches(indices, size):
        images = batch.inputs.unflatten(0, (-1, batch.views))
        views |= {int(i): x.numpy().tobytes() for i, x in zip(batch.labels, images, strict=True)}
    return views


def mixed_sizes() -> EncodedImages:
    stacks = (some_images(3, 16, 16), some_images(3, 12, 12))
    places = ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (0, 2))
    return EncodedImages(stacks, tuple(range(6)), places)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_views_of_an_image_depend_on_no_other_image_of_the_batch(size):
    everyone = shown(InViews(mixed_sizes(), 3, seeded(0, "views")), list(range(6)), 6)
    assert len(set(everyone.values())) == 6
    for drawn in ([4], [0, 5], [1, 2, 3, 4]):
        some = shown(InViews(mixed_sizes(), 3, seeded(0, "views")), drawn, size)
        assert some == {index: everyone[index] for index in drawn}


def test_every_batch_shows_new_views_also_after_an_empty_batch():
    data = InViews(mixed_sizes(), 2, seeded(0, "views"))
    first, _, third = (shown(data, indices, 4) for indices in ([0, 1], [], [0, 1]))
    again = InViews(mixed_sizes(), 2, seeded(0, "views"))
    assert shown(again, [0, 1], 4) == first
    assert shown(again, [0, 1], 4) not in (first, third)
    assert shown(again, [0, 1], 4) == third


def test_one_view_is_the_example_itself_and_draws_nothing():
    data, rng = mixed_sizes(), seeded(0, "views")
    assert private_views(data, 1, rng) is data
    assert rng.random() == seeded(0, "views").random()
    assert isinstance(private_views(data, 2, rng), InViews)


# The loss of an example.


def test_the_loss_of_an_example_is_the_mean_of_its_views_losses():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1])
    found = mean_over_views(CLASSIFICATION.losses, logits, labels, 3)
    for i in range(2):
        each = [-float(logits[3 * i + j].log_softmax(0)[labels[i]]) for j in range(3)]
        assert float(found[i]) == pytest.approx(np.mean(each), rel=1e-12)
    one = mean_over_views(CLASSIFICATION.losses, logits[:2], labels, 1)
    assert torch.equal(one, CLASSIFICATION.losses(logits[:2], labels))


# The private step, with a loop over examples and views in float64.


@pytest.fixture
def model_of(images, monkeypatch):
    """A tiny model in float64 with all tensors active and random, built as a run builds it."""
    whole = Pixels.__call__

    def make(kind: str, kernel: str = "fused") -> Backbone:
        config = images(kind, **{"lora.kernel": kernel})
        backbone, _ = _build(
            config.model, config.lora, 2, config.seed, False
        )  # not the process's own
        backbone.engine.activate(frozenset(backbone.engine.parameters))
        randomise(backbone.model)
        monkeypatch.setattr(Pixels, "__call__", lambda self, images: whole(self, images).double())
        return backbone

    return make


DATA = EncodedImages.of_one_size(some_images(EXAMPLES), (0, 1, 1, 0, 1, 0))


def one_by_one(backbone: Backbone, views: int, seed: int, q: float = 1.0) -> dict[int, Grads]:
    """The gradient of each drawn image: the mean over its views of autograd on one view alone."""
    model = without_engine(backbone.model)
    plain = copy.copy(backbone)
    plain.model = model
    stream = seeded(seed, "sampling")
    drawn = poisson_batch(EXAMPLES, q, stream)
    numbers = stream.random((EXAMPLES, views, 3))
    grads = {}
    for i in drawn.tolist():
        single = DATA.batch([i])
        rows = []
        for j in range(views):
            view = plain_view(single.inputs[0].numpy(), numbers[i, j])
            logits = plain.logits(replace(single, inputs=torch.from_numpy(view)[None]))
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits.double(), single.labels).backward()
            rows.append({wire_name(n): p.grad.clone() for n, p in trained(model).items()})
        grads[i] = {name: sum(row[name] for row in rows) / views for name in rows[0]}
    return grads


def norm_of(grads: Grads) -> float:
    return joint(list(grads.values()))


def scale(norm: float, clip_norm: float, clipping: str) -> float:
    shift = 0.01 if clipping == "automatic" else 0.0
    factor = clip_norm * CLIP_MARGIN / (norm + shift)
    return factor if clipping == "automatic" else min(1.0, factor)


def released(backbone, views, *, seed=0, q=1.0, clip_norm, clipping="flat", size=4, data=DATA):
    """The clipped sum of one private step without noise."""
    streams = RandomStreams(seeded(seed, "sampling"), seeded(seed, "noise"))
    noised = private_gradient(
        backbone,
        private_views(data, views, streams.sampling),
        reservation=Reservation(Release(q, 0.0, 1)),
        clip_norm=clip_norm,
        micro_batch=size,
        streams=streams,
        clipping=clipping,
    )
    return {name: q * len(data) * grad for name, grad in noised.items()}


def assert_sum(found: Grads, expected: list[Grads], tolerance: float) -> None:
    total = {name: sum(grads[name] for grads in expected) for name in expected[0]}
    assert set(found) == set(total)
    off = joint([found[name] - total[name] for name in total])
    assert off <= tolerance * norm_of(total)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_an_image_is_clipped_once_after_the_mean_over_its_views(kind, clipping, model_of):
    backbone = model_of(kind)
    grads = one_by_one(backbone, 3, seed=0)
    norms = {i: norm_of(own) for i, own in grads.items()}
    clip_norm = float(np.median(list(norms.values())))
    expected = [
        {n: scale(norms[i], clip_norm, clipping) * g for n, g in own.items()}
        for i, own in grads.items()
    ]
    for size in (1, 4):
        found = released(backbone, 3, clip_norm=clip_norm, clipping=clipping, size=size)
        assert_sum(found, expected, 1e-6)  # the logits are float32


@pytest.mark.parametrize("kernel", ["merged", "plain"])
def test_every_kernel_takes_the_views_of_an_image_as_one_example(kernel, model_of):
    backbone = model_of("swin", kernel)
    expected = list(one_by_one(backbone, 2, seed=1).values())
    assert_sum(released(backbone, 2, seed=1, clip_norm=math.inf), expected, 1e-6)


@pytest.mark.slow
def test_the_compiled_kernel_takes_the_views_of_an_image_as_one_example(model_of, monkeypatch):
    graphs_only = partial(torch.compile, backend="aot_eager")  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", graphs_only)
    backbone = model_of("vit", "compiled")
    expected = list(one_by_one(backbone, 2, seed=1).values())
    assert_sum(released(backbone, 2, seed=1, clip_norm=math.inf), expected, 1e-6)


def test_poisson_batches_are_those_of_a_step_without_views(model_of):
    backbone, q = model_of("vit"), 0.5
    sizes = set()
    for seed in range(3):
        expected = one_by_one(backbone, 2, seed=seed, q=q)
        sizes.add(len(expected))
        found = released(backbone, 2, seed=seed, q=q, clip_norm=math.inf)
        assert_sum(found, list(expected.values()), 1e-6)
    assert len(sizes) > 1


class WithEmptyRecord(EncodedImages):
    """The images with one record empty: it is drawn and adds nothing."""

    empty = -1

    def parts(self, indices, size):
        yield from super().parts([i for i in indices if i != self.empty], size)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_no_image_moves_the_sum_by_more_than_the_clip_norm(kind, views, clipping, model_of):
    backbone = model_of(kind)
    smallest = min(norm_of(grads) for grads in one_by_one(backbone, views, seed=0).values())
    clip_norm = smallest / 10  # the views of an image have similar gradients, all above it
    arguments = {"clip_norm": clip_norm, "clipping": clipping}
    whole = released(backbone, views, **arguments)
    for left_out in range(EXAMPLES):
        data = WithEmptyRecord(DATA.stacks, DATA.labels, DATA.places)
        object.__setattr__(data, "empty", left_out)
        rest = released(backbone, views, data=data, **arguments)
        moved = joint([whole[name] - rest[name] for name in whole])
        assert 0.5 * clip_norm < moved <= clip_norm * (1 + 1e-6)


def test_more_views_of_one_image_do_not_lengthen_its_gradient(model_of):
    backbone = model_of("vit")
    data = EncodedImages.of_one_size(some_images(1), (1,))
    norms = [
        norm_of(released(backbone, views, clip_norm=1e-3, data=data)) for views in (1, 2, 4, 8)
    ]
    assert all(norm <= 1e-3 for norm in norms)
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in pairwise(norms))


def test_a_round_takes_its_steps_on_the_views(images):
    changes = {"train.views": 3, "train.local-steps": 1}
    config = images("vit", method="dp-lora", **changes)
    backbone, start = build(config)
    reservation = Reservation(Release(1.0, 0.0, 1))
    local = LocalSettings(METHODS[config.method], 1, 1, config.train, config.rule, 0.7)
    streams = RandomStreams(seeded(0, "sampling"), seeded(0, "noise"))
    arguments = {"local": local, "reservation": reservation, "streams": streams}
    result = run_round(backbone, DATA, start, {}, **arguments)
    rates = learning_rates(config.train, config.rule, 1)
    backbone.load(start)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    sums = released(backbone, 3, clip_norm=0.7)
    for name, total in sums.items():
        expected = start[name] - rates[kind(name)] * total.numpy() / EXAMPLES
        np.testing.assert_allclose(result[name], expected, rtol=1e-4, atol=1e-5)
    assert joint([sums[n] - g for n, g in released(backbone, 1, clip_norm=0.7).items()]) > 1e-3
