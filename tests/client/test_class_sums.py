"""The release of class sums: against plain sums, one example's influence, and the noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.gaussians import assert_gaussian
from lalora_app.client.class_sums import run_class_sums
from lalora_app.data.encoding import Batch
from lalora_app.data.examples import split, with_classes
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.frozen_weights import FrozenWeights
from lalora_app.models.scores import CLASSIFICATION
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import BudgetError
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.step import RandomStreams

CLASSES, FEATURES = 3, 4
NAMES = ("classifier.weight", "classifier.bias")


class Rows:
    """Examples whose features are the rows of a matrix; ``left_out`` are empty records."""

    def __init__(self, features, labels, left_out=()):
        self.features = torch.tensor(np.array(features), dtype=torch.float32)
        self.labels, self.left_out = torch.tensor(labels), set(left_out)

    def __len__(self):
        return len(self.labels)

    def micro_batches(self, indices, size):
        kept = [int(i) for i in indices if int(i) not in self.left_out]
        for start in range(0, len(kept), size):
            part = kept[start : start + size]
            yield Batch(self.features[part], None, self.labels[part])


def head_alone(bias: bool = True) -> Backbone:
    """A model that is nothing but its head."""
    model = torch.nn.ModuleDict({"classifier": torch.nn.Linear(FEATURES, CLASSES, bias=bias)})
    parameters = dict(model.named_parameters())
    return Backbone(
        model=model,
        task=CLASSIFICATION,
        forward=lambda model, inputs, mask: model["classifier"](inputs),
        encode=list,
        engine=KernelEngine(model, parameters, "plain"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        targets=0,
        frozen_weights=FrozenWeights({}),
        fingerprint={},
    )


def released(model, data, *, z=0.0, seed=0, micro_batch=2, start=None):
    """The client's upload times its number of examples: (classes, features + 1)."""
    start = model.adapter() if start is None else start
    result = run_class_sums(
        model,
        data,
        start,
        {},
        micro_batch=micro_batch,
        reservation=Reservation(Release(1.0, z, 1)),
        streams=RandomStreams(seeded(seed, "sampling"), seeded(seed, "noise")),
    )
    head = [result[name] for name in result if ".lora_" not in name]
    return len(data) * np.column_stack([x.reshape(len(x), -1) for x in head]).astype(float)


def plain_sums(features, labels, classes=CLASSES):
    """The sums in float64, one example after the other."""
    sums = np.zeros((classes, len(features[0]) + 1))
    for feature, label in zip(features, labels, strict=True):
        longer = np.append(np.asarray(feature, float), 1.0)
        sums[label] += longer / np.linalg.norm(longer)
    return sums


FLOATS = st.floats(width=32)  # also inf and nan
FINITE = st.floats(-1e6, 1e6, width=32)


def examples(numbers, smallest=1):
    example = st.tuples(
        st.lists(numbers, min_size=FEATURES, max_size=FEATURES), st.integers(0, CLASSES - 1)
    )
    return st.lists(example, min_size=smallest, max_size=7)


@settings(deadline=None, max_examples=60)
@given(examples(FINITE), st.integers(1, 4))
def test_the_sums_are_those_of_a_plain_loop(rows, micro_batch):
    features, labels = zip(*rows, strict=True)
    found = released(head_alone(), Rows(features, labels), micro_batch=micro_batch)
    np.testing.assert_allclose(found, plain_sums(features, labels), atol=2e-5 * len(rows))


@settings(deadline=None, max_examples=150)
@given(examples(FLOATS, smallest=2), st.data())
def test_one_example_moves_the_sums_by_at_most_one_whatever_the_others_are(rows, data):
    features, labels = zip(*rows, strict=True)
    one = data.draw(st.integers(0, len(rows) - 1))
    model = head_alone()
    whole = released(model, Rows(features, labels))
    less = released(model, Rows(features, labels, left_out=[one]))
    assert np.isfinite(whole).all()
    assert np.linalg.norm(whole - less) <= 1 + 1e-6 * len(rows)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_example_that_is_not_finite_adds_nothing(bad):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(4, FEATURES)), [0, 1, 2, 0]
    features[1, 2] = bad
    found = released(head_alone(), Rows(features, labels))
    rest = [0, 2, 3]
    expected = plain_sums(features[rest], [labels[i] for i in rest])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_ordinary_example_counts_with_length_one_and_not_less():
    data = Rows([[3.0, 4.0, 0.0, 0.0]], [1])
    assert np.linalg.norm(released(head_alone(), data)) == pytest.approx(1.0, abs=2e-5)


def test_a_head_without_bias_has_no_appended_one():
    data = Rows([[3.0, 4.0, 0.0, 0.0]], [1])
    found = released(head_alone(bias=False), data)
    np.testing.assert_allclose(found[1], [0.6, 0.8, 0.0, 0.0], atol=2e-5)


def test_every_example_is_in_the_batch_and_the_head_itself_has_no_effect():
    rng = np.random.default_rng(0)
    data = Rows(rng.normal(size=(50, FEATURES)), rng.integers(0, CLASSES, 50).tolist())
    model = head_alone()
    other = {name: x + 5 for name, x in model.adapter().items()}
    first, second = released(model, data, seed=1), released(model, data, seed=2, start=other)
    np.testing.assert_allclose(first, second, atol=1e-4)
    np.testing.assert_allclose(first, plain_sums(data.features, data.labels), atol=1e-3)


def test_the_sum_of_many_examples_is_rounded_once_and_not_for_each():
    one, many = [0.3, 0.7, 0.1, 0.9], 2000
    found = released(head_alone(), Rows([one] * many, [1] * many), micro_batch=1)
    single = released(head_alone(), Rows([one], [1]), micro_batch=1)
    assert np.abs(found - many * single).max() <= 3e-7 * many


def test_every_entry_has_noise_of_the_releases_size():
    rng, z = np.random.default_rng(0), 7.0
    data = Rows(rng.normal(size=(20, FEATURES)), rng.integers(0, CLASSES, 20).tolist())
    model = head_alone()
    clean = released(model, data)
    noise = np.stack([released(model, data, z=z, seed=seed) - clean for seed in range(150)])
    assert_gaussian(noise.ravel(), z)
    assert noise.std(axis=0).min() / z > 0.7  # no entry of any class is left out
    assert np.abs(np.corrcoef(noise.reshape(150, -1).T) - np.eye(clean.size)).max() < 0.5


def test_one_reservation_is_one_release():
    reservation = Reservation(Release(1.0, 1.0, 1))
    streams = RandomStreams(seeded(0, "sampling"), seeded(0, "noise"))
    model, data = head_alone(), Rows([[1.0] * FEATURES], [0])
    given_ = {"micro_batch": 1, "reservation": reservation, "streams": streams}
    run_class_sums(model, data, model.adapter(), {}, **given_)
    with pytest.raises(BudgetError):
        run_class_sums(model, data, model.adapter(), {}, **given_)


def head_inputs(backbone, batch):
    """The pooled inputs of the head in a forward pass, by a hook on the layer itself."""
    (head,) = (
        module
        for name, module in backbone.model.named_modules()
        if name.endswith("modules_to_save.default")
    )
    seen, forward = [], head.forward
    head.forward = lambda x: (seen.append(x.detach().double()), forward(x))[1]
    with torch.no_grad():
        backbone.logits(batch)
    head.forward = forward  # the engine's own, which is set on the layer itself
    (found,) = seen
    if found.dim() == 3:  # (examples, tokens, features): the mean over the tokens
        weights = batch.mask[..., None].double()
        found = (found * weights).sum(1) / weights.sum(1)
    return found.numpy()


@pytest.mark.parametrize("kernel", ["fused", "merged", "plain"])
@pytest.mark.parametrize("model", ["mean", "swin", "hf-vit"])
def test_the_features_are_the_pooled_inputs_of_the_head(model, kernel, tiny, images):
    keys = {"model.head": "class-means", "lora.kernel": kernel}
    config = tiny(**keys, **{"model.pooling": "mean"}) if model == "mean" else images(model, **keys)
    backbone, start = build(config)
    encoded = backbone.encode(split(with_classes(config.data))[1])
    indices = range(9)
    batch = encoded.batch(indices)

    class Nine:
        def __len__(self):
            return 9

        def micro_batches(self, chosen, size):
            yield from encoded.micro_batches(chosen, size)

    found = released(backbone, Nine(), start=start, micro_batch=4)
    backbone.load(start)
    features = head_inputs(backbone, batch)
    np.testing.assert_allclose(found, plain_sums(features, batch.labels, 2), atol=1e-4)


def test_a_method_with_gates_releases_the_head_alone(tiny):
    config = tiny(**{"method": "beamlora", "model.head": "class-means", "model.pooling": "mean"})
    backbone, start = build(config)
    encoded = backbone.encode(split(with_classes(config.data))[1])
    before = {name: x.copy() for name, x in start.items()}
    result = run_class_sums(
        backbone,
        encoded,
        start,
        {},
        micro_batch=16,
        reservation=Reservation(Release(1.0, 0.0, 1)),
        streams=RandomStreams(seeded(0, "sampling"), seeded(0, "noise")),
    )
    changed = {name for name in result if not np.array_equal(result[name], before[name])}
    assert changed == {name for name in start if ".lora_" not in name}
