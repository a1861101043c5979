"""Tests of the mechanism: sensitivity to one example, noise, Poisson batches, reservations."""

import copy
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.gaussians import assert_gaussian, flat
from lalora_app.blocks.adapters import wire_name
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import BudgetError
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import secure, seeded
from lalora_app.private_step import mechanism
from lalora_app.private_step.gradients import (
    FlatBlock,
    OuterProductBlock,
    PerExampleGrads,
    StoredShape,
)
from lalora_app.private_step.mechanism import (
    AUTOMATIC_SHIFT,
    CLIP_MARGIN,
    CLIPPINGS,
    _sum_of_two_normals,
    add_noise,
    clip_scales,
    clipped_sum,
    poisson_batch,
)
from lalora_app.private_step.step import RandomStreams, private_gradient

SHAPES = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2), "classifier.bias": (3,)}
EXAMPLES = 12


Grads = dict[str, torch.Tensor]  # (examples, *shape)


def random_grads(seed: int, scales: list[float], dtype: torch.dtype) -> Grads:
    """Draw one gradient per example with about the given norms; norms differ per tensor as well."""
    rng = np.random.default_rng(seed)
    size = torch.tensor(scales, dtype=torch.float64)
    grads = {}
    for number, (name, shape) in enumerate(SHAPES.items(), start=1):
        unit = torch.from_numpy(rng.standard_normal((len(scales), *shape)))
        rows = number * size[:, None] * unit.flatten(1)
        grads[name] = rows.reshape(unit.shape).to(dtype)
    return grads


def rows_of(grads: Grads, chosen: list[int]) -> Grads:
    return {name: grad[chosen] for name, grad in grads.items()}


def blocks(grads: Grads) -> PerExampleGrads:
    """Return one block per tensor, with copies, because the private step overwrites rows."""
    return PerExampleGrads(
        tuple(
            FlatBlock({name: StoredShape(tuple(grad.shape[1:]))}, grad.flatten(1).clone())
            for name, grad in grads.items()
        )
    )


def clipped(grads: Grads, clip_norm: float, clipping: str = "flat") -> Grads:
    return clipped_sum(blocks(grads), clip_norm, clipping)


def joint_norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def factor(norm: float, clip_norm: float, clipping: str) -> float:
    if clipping == "automatic":
        return clip_norm * CLIP_MARGIN / (norm + 0.01)
    return min(1.0, clip_norm * CLIP_MARGIN / (norm or 1.0))


def loop_clipped_sum(grads: Grads, clip_norm: float, clipping: str) -> dict[str, torch.Tensor]:
    """Return the clipped sum by a float64 loop over examples, with the norm over all tensors."""
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for i in range(len(next(iter(grads.values())))):
        example = {name: grad[i].double() for name, grad in grads.items()}
        scale = factor(joint_norm(example), clip_norm, clipping)
        for name, grad in example.items():
            sums[name] += scale * grad
    return sums


def assert_close(found, expected, tolerance: float) -> None:
    assert set(found) == set(expected)
    scale = joint_norm(expected)
    off = joint_norm({name: found[name].double() - expected[name] for name in expected})
    assert off <= tolerance * scale


# (i) Sensitivity to one example.

sizes = st.integers(-40, 20).map(lambda exponent: 10.0**exponent)
clip_norms = st.integers(-6, 6).map(
    lambda exponent: 10.0**exponent
)  # all clipping norms that a config accepts


@given(
    scales=st.lists(sizes, min_size=1, max_size=4),
    clip_norm=clip_norms,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    clipping=st.sampled_from(list(CLIPPINGS)),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_example_moves_the_sum_by_more_than_the_clip_norm(
    scales, clip_norm, seed, dtype, clipping
):
    grads = random_grads(seed, scales, dtype)
    whole = clipped(grads, clip_norm, clipping)
    everyone = list(range(len(scales)))
    for i in everyone:
        alone = clipped(rows_of(grads, [i]), clip_norm, clipping)
        assert joint_norm(alone) <= clip_norm
        without = clipped(rows_of(grads, [j for j in everyone if j != i]), clip_norm, clipping)
        moved = {name: whole[name].double() - without[name].double() for name in whole}
        assert joint_norm(moved) <= clip_norm * (1 + 1e-6)


@given(
    given=st.tuples(st.integers(-44, 37), st.integers(-44, 37)),
    clip_norm=clip_norms,
    seed=st.integers(0, 2**32 - 1),
    clipping=st.sampled_from(list(CLIPPINGS)),
)
@example(given=(-24, 18), clip_norm=1e-6, seed=0, clipping="flat")  # the float32 norm of g is 0
@example(given=(-44, 36), clip_norm=1e-6, seed=0, clipping="flat")  # g has no digits to be scaled
@example(given=(-24, 18), clip_norm=1e-6, seed=0, clipping="automatic")
@example(given=(-44, 36), clip_norm=1e6, seed=0, clipping="automatic")
@settings(max_examples=500, deadline=None, derandomize=True)
def test_no_head_of_any_size_exceeds_the_clip_norm(given, clip_norm, seed, clipping):
    rng = np.random.default_rng(seed)
    shapes = ((1, 3), (1, 50))
    g, x = (
        torch.from_numpy(rng.standard_normal(shape) * 10.0**power).float()
        for shape, power in zip(shapes, given, strict=True)
    )
    true = float(g.double().norm() * x.double().norm())
    found = clipped_sum(PerExampleGrads((OuterProductBlock("head", g, x),)), clip_norm, clipping)
    assert joint_norm(found) <= clip_norm
    if 1e-30 < true < math.inf:
        expected = true * factor(true, clip_norm, clipping)
        assert joint_norm(found) == pytest.approx(expected, rel=1e-4, abs=1e-36)


@given(
    scales=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    clip_norm=st.floats(0.1, 100),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_clipping_is_flat_over_all_tensors_of_an_example(scales, clip_norm, seed):
    grads = random_grads(seed, scales, torch.float64)
    assert_close(clipped(grads, clip_norm), loop_clipped_sum(grads, clip_norm, "flat"), 1e-5)


@given(
    scales=st.lists(st.integers(-5, 2).map(lambda power: 10.0**power), min_size=1, max_size=6),
    clip_norm=clip_norms,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_automatic_clipping_equals_a_float64_loop(scales, clip_norm, seed, dtype):
    grads = random_grads(seed, scales, dtype)
    expected = loop_clipped_sum(grads, clip_norm, "automatic")
    assert_close(clipped(grads, clip_norm, "automatic"), expected, 1e-6)


def test_automatic_clipping_lengthens_small_gradients_and_shortens_large_ones():
    assert AUTOMATIC_SHIFT == 0.01
    grads = random_grads(0, [1e-9, 1e-2, 1e9], torch.float64)
    norms = [joint_norm({n: g[i] for n, g in grads.items()}) for i in range(3)]
    found = [joint_norm(clipped(rows_of(grads, [i]), 2.0, "automatic")) for i in range(3)]
    assert found[0] == pytest.approx(200 * norms[0], rel=1e-4)  # C/γ
    assert norms[1] < found[1] < 2
    assert found[2] == pytest.approx(2, rel=1e-4)


def test_under_automatic_clipping_the_clip_norm_is_a_factor_of_the_sum_and_nothing_else():
    grads = random_grads(5, [1e-3, 1.0, 1e3], torch.float32)
    one, four = (clipped(grads, clip_norm, "automatic") for clip_norm in (0.5, 2.0))
    assert all(torch.equal(4 * one[name], four[name]) for name in one)
    assert not all(
        torch.equal(4 * t, clipped(grads, 2.0)[n]) for n, t in clipped(grads, 0.5).items()
    )


def test_the_flat_clip_is_neither_per_tensor_nor_of_the_batch():
    grads = random_grads(0, [1.0, 3.0, 0.1], torch.float64)
    norms = [joint_norm({n: g[i] for n, g in grads.items()}) for i in range(3)]
    scales = clip_scales(blocks(grads).norms(), 2.0)
    for norm, scale in zip(norms, scales.tolist(), strict=True):
        assert scale == pytest.approx(min(1.0, 2.0 * CLIP_MARGIN / norm))
    assert norms[2] < 2 < norms[0] < norms[1]
    one_by_one = [clipped({n: g}, 2.0)[n] for n, g in grads.items()]
    flat = clipped(grads, 2.0)
    assert math.sqrt(sum(float(t.square().sum()) for t in one_by_one)) > 1.1 * joint_norm(flat)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("clip_norm", "clipping"), [(1.0, "flat"), (math.inf, "flat"), (1.0, "automatic")]
)
def test_a_non_finite_example_adds_exactly_nothing_and_leaves_the_others(
    bad, dtype, clip_norm, clipping
):
    grads = random_grads(1, [1.0, 2.0, 3.0], dtype)
    grads["q.lora_B.weight"][1, 2, 0] = bad
    alone = clipped(rows_of(grads, [1]), clip_norm, clipping)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in alone.values())
    others = clipped(rows_of(grads, [0, 2]), clip_norm, clipping)
    assert joint_norm(others) > 0
    assert_close(clipped(grads, clip_norm, clipping), others, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_clip_norm_the_sum_is_plain(dtype):
    grads = random_grads(2, [0.0, 1e-3, 1.0, 1e3], dtype)
    found = clipped(grads, math.inf)
    assert_close(found, {name: grad.double().sum(0) for name, grad in grads.items()}, 1e-6)
    assert all(tensor.dtype == dtype for tensor in found.values())


@pytest.mark.parametrize(
    ("clip_norm", "clipping"), [(0.5, "flat"), (math.inf, "flat"), (0.5, "automatic")]
)
def test_an_example_without_gradient_is_no_obstacle(clip_norm, clipping):
    grads = random_grads(3, [0.0, 1.0], torch.float32)
    other = clipped(rows_of(grads, [1]), clip_norm, clipping)
    assert_close(clipped(grads, clip_norm, clipping), other, 1e-6)
    alone = clipped(rows_of(grads, [0]), clip_norm, clipping)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in alone.values())


def test_examples_below_the_clip_norm_are_left_as_they_are():
    grads = random_grads(4, [1e-3], torch.float64)
    found = clipped(grads, 1.0)
    assert all(torch.equal(found[name], grads[name][0]) for name in SHAPES)


# (ii) Noise.


def test_add_noise_has_the_given_deviation_and_divides_by_the_expected_batch():
    sums = {"a": torch.full((40, 50), 3.0), "b": torch.full((2000,), -5.0)}
    noised = add_noise(sums, noise_std=1.4, expected_batch=8.0, rng=seeded(0, "noise"))
    assert_gaussian((noised["a"].double() - 3 / 8).numpy().ravel(), 1.4 / 8)
    assert_gaussian((noised["b"].double() + 5 / 8).numpy().ravel(), 1.4 / 8)
    assert all(noised[name].dtype == sums[name].dtype for name in sums)


def test_every_entry_of_every_tensor_has_noise_of_its_own():
    zeros = {name: torch.zeros(3000, dtype=torch.float64) for name in "ab"}
    rng = seeded(1, "noise")
    draws = [add_noise(zeros, noise_std=1.0, expected_batch=1.0, rng=rng) for _ in range(2)]
    series = [draw[name].numpy() for draw in draws for name in "ab"]
    series += [np.roll(series[0], 1)]
    for one, other in combinations(series, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(3000)


def test_without_noise_the_sums_are_divided_and_nothing_else():
    sums = {"a": torch.tensor([1.0, -8.0], dtype=torch.float64)}
    noised = add_noise(sums, noise_std=0.0, expected_batch=4.0, rng=secure())
    assert noised["a"].tolist() == [0.25, -2.0]


# The private step on a real model.


@pytest.fixture
def backbone(tiny):
    """Return a model with all tensors active and random; with B = 0, A would have no gradient."""
    model, start = build(tiny())
    rng = np.random.default_rng(0)
    model.load({n: rng.normal(0, 0.5, a.shape).astype(np.float32) for n, a in start.items()})
    model.engine.activate(frozenset(model.engine.parameters))
    yield model
    model.load(start)


@pytest.fixture
def data(tiny, backbone) -> EncodedTexts:
    config = tiny()
    encoded = backbone.encode(split(config.data)[0])
    return EncodedTexts(encoded.tokens[:EXAMPLES], encoded.labels[:EXAMPLES], encoded.pad)


def loop_gradients(backbone: Backbone, data: EncodedTexts) -> list[dict[str, torch.Tensor]]:
    """Return gradients by autograd, without the engine, with one example per batch."""
    model = copy.deepcopy(backbone.model)
    for module in model.modules():
        vars(module).pop("forward", None)
    plain = replace(backbone, model=model)
    grads = []
    for i in range(len(data)):
        model.zero_grad()
        plain.losses(data.batch([i])).sum().backward()
        trained = {wire_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        grads.append({name: p.grad.double() for name, p in trained.items()})
    return grads


def scaled_sum(grads: list[dict[str, torch.Tensor]], factors: list[float]):
    return {
        name: sum(f * g[name] for f, g in zip(factors, grads, strict=True)) for name in grads[0]
    }


def streams(seed: int = 0) -> RandomStreams:
    return RandomStreams(seeded(seed, "sampling"), seeded(seed, "noise"))


def release(
    backbone, data, *, q=1.0, z=0.0, clip_norm=math.inf, micro_batch=64, seed=0, clipping="flat"
):
    return private_gradient(
        backbone,
        data,
        reservation=Reservation(Release(q, z, 1)),
        clip_norm=clip_norm,
        micro_batch=micro_batch,
        streams=streams(seed),
        clipping=clipping,
    )


def test_without_noise_and_clip_at_rate_one_it_is_the_plain_mean_gradient(backbone, data):
    grads = loop_gradients(backbone, data)
    expected = scaled_sum(grads, [1 / EXAMPLES] * EXAMPLES)
    assert_close(release(backbone, data), expected, 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_each_example_is_clipped_on_its_own(backbone, data, clipping):
    grads = loop_gradients(backbone, data)
    norms = [joint_norm(grad) for grad in grads]
    clip_norm = float(np.median(norms))
    expected = scaled_sum(grads, [factor(n, clip_norm, clipping) / EXAMPLES for n in norms])
    found = release(backbone, data, clip_norm=clip_norm, clipping=clipping, micro_batch=5)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_do_not_change_the_sum(backbone, data, micro_batch):
    whole = release(backbone, data, clip_norm=0.5)
    parts = release(backbone, data, clip_norm=0.5, micro_batch=micro_batch)
    assert_close(parts, {name: tensor.double() for name, tensor in whole.items()}, 1e-5)


def test_a_gpus_noise_is_standard_and_needs_two_keys_to_be_found(monkeypatch):
    """Runs on the CPU's generator in place of a GPU's. One seed of 63 bits could be searched."""
    drawn, draw = [], mechanism._device_normals

    def seen(size, like, seed):
        drawn.append((seed, draw(size, like, seed)))
        return drawn[-1][1].clone()

    monkeypatch.setattr(mechanism, "_device_normals", seen)
    noise = [_sum_of_two_normals(20_000, torch.zeros(1), seeded(0, "noise", i)) for i in range(4)]
    assert len({seed for seed, _ in drawn}) == 8  # new seeds for every release
    for i, found in enumerate(noise):
        (_, first), (_, second) = drawn[2 * i : 2 * i + 2]
        torch.testing.assert_close(found, (first + second) / math.sqrt(2))
    assert_gaussian(torch.cat(noise).double().numpy(), 1.0)


@pytest.mark.parametrize("micro_batch", [2, 64])
def test_noise_is_added_once_however_many_micro_batches(backbone, data, micro_batch):
    z, clip_norm = 2.0, 0.7
    clean = flat(release(backbone, data, clip_norm=clip_norm, micro_batch=micro_batch))
    noise = [
        flat(release(backbone, data, z=z, clip_norm=clip_norm, micro_batch=micro_batch, seed=seed))
        - clean
        for seed in range(8)
    ]
    assert_gaussian(np.concatenate(noise), z * clip_norm / EXAMPLES)


def test_an_empty_batch_is_pure_noise_and_uses_up_a_reservation(backbone, data):
    q, z, clip_norm = 1e-9, 2.0, 0.7
    reservation = Reservation(Release(q, z, 8))
    random = streams()
    arguments = {"reservation": reservation, "clip_norm": clip_norm, "micro_batch": 4}
    noise = [flat(private_gradient(backbone, data, streams=random, **arguments)) for _ in range(8)]
    assert_gaussian(np.concatenate(noise) * q * EXAMPLES, z * clip_norm)
    with pytest.raises(BudgetError):
        private_gradient(backbone, data, streams=random, **arguments)


def test_the_sum_is_divided_by_the_expected_and_not_by_the_realised_batch(backbone, data):
    grads, q = loop_gradients(backbone, data), 0.25
    realised = set()
    for seed in range(4):
        drawn = streams(seed).sampling.random(EXAMPLES) < q
        realised.add(int(drawn.sum()))
        expected = scaled_sum(grads, [taken / (q * EXAMPLES) for taken in drawn])
        assert_close(release(backbone, data, q=q, seed=seed), expected, 1e-5)
    assert realised - {q * EXAMPLES}  # at least one batch differs from the expected size


def test_only_active_tensors_are_released(backbone, data):
    active = frozenset(name for name in backbone.engine.parameters if ".lora_A." not in name)
    backbone.engine.activate(active)
    assert set(release(backbone, data, z=1.0, clip_norm=1.0)) == active


def test_the_private_step_leaves_parameters_and_their_grads_alone(backbone, data):
    before = backbone.adapter()
    for parameter in backbone.engine.parameters.values():
        parameter.grad = None
    release(backbone, data, z=1.0, clip_norm=1.0)
    assert all(np.array_equal(array, before[n]) for n, array in backbone.adapter().items())
    assert all(parameter.grad is None for parameter in backbone.engine.parameters.values())


# (iii) Poisson batches.


def test_every_subset_comes_with_the_chance_of_independent_draws():
    size, rate, draws = 4, 0.35, 8000
    rng = seeded(0, "sampling")
    seen = Counter(tuple(poisson_batch(size, rate, rng).tolist()) for _ in range(draws))
    subsets = [s for k in range(size + 1) for s in combinations(range(size), k)]
    assert set(seen) <= set(subsets)
    expected = [draws * rate ** len(s) * (1 - rate) ** (size - len(s)) for s in subsets]
    assert stats.chisquare([seen[s] for s in subsets], expected).pvalue > 0.001


def test_batch_sizes_are_binomial_and_not_fixed():
    size, rate, draws = 60, 0.2, 3000
    rng = seeded(1, "sampling")
    batches = [poisson_batch(size, rate, rng) for _ in range(draws)]
    counts = np.array([len(batch) for batch in batches])
    assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    assert all(((batch >= 0) & (batch < size)).all() for batch in batches)
    variance = size * rate * (1 - rate)
    # The deviation of a variance's estimate is about sqrt(2/draws), 2.6 %.
    assert counts.var() == pytest.approx(variance, rel=0.1)
    assert counts.mean() == pytest.approx(size * rate, abs=5 * math.sqrt(variance / draws))
    lowest, highest = 6, 18  # both tails in one bin each: every bin expects more than 5
    clipped = Counter(np.clip(counts, lowest, highest).tolist())
    law = stats.binom(size, rate)
    inner = [law.pmf(k) for k in range(lowest + 1, highest)]
    chances = [law.cdf(lowest), *inner, law.sf(highest - 1)]
    observed = [clipped[k] for k in range(lowest, highest + 1)]
    assert stats.chisquare(observed, [draws * chance for chance in chances]).pvalue > 0.001


def test_the_ends_of_the_rate():
    assert poisson_batch(50, 1.0, secure()).tolist() == list(range(50))
    assert poisson_batch(50, 0.0, secure()).tolist() == []


# (iv) The reservation.


def test_a_used_up_reservation_refuses_before_anything_is_drawn(backbone, data):
    reservation = Reservation(Release(0.5, 1.0, 1))
    random = streams()
    arguments = {"reservation": reservation, "clip_norm": 1.0, "micro_batch": 4}
    private_gradient(backbone, data, streams=random, **arguments)
    states = [repr(rng.bit_generator.state) for rng in (random.sampling, random.noise)]
    with pytest.raises(BudgetError):
        private_gradient(backbone, data, streams=random, **arguments)
    assert [repr(rng.bit_generator.state) for rng in (random.sampling, random.noise)] == states


def test_sampling_and_noise_come_from_their_own_streams(backbone, data):
    random, again = streams(), streams()
    reservation = Reservation(Release(0.5, 1.0, 1))
    private_gradient(
        backbone, data, reservation=reservation, clip_norm=1.0, micro_batch=4, streams=random
    )
    again.sampling.random(EXAMPLES)
    for array in backbone.adapter().values():
        again.noise.standard_normal(array.shape)
    assert random.sampling.random() == again.sampling.random()
    assert random.noise.random() == again.noise.random()
