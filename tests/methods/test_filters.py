"""The binomial filter, its controls and HetLoRA's penalty, compared with float64 loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_config
from lalora_app.methods.filters import (
    TAPS,
    binomial,
    identity,
    no_penalty,
    permuted,
    scaled,
    smooth,
    tail_penalty,
)
from lalora_app.private_step.gradients import NoisedGrads

KERNEL = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
A_NAME = "base_model.model.q.lora_A.weight"
B_NAME = "base_model.model.q.lora_B.weight"
HEAD_NAME = "base_model.model.classifier.weight"


def reflected(index: int, length: int) -> int:
    """Return the index under symmetric padding: ... x1 x0 | x0 x1 ... x_n | x_n ..."""
    while not 0 <= index < length:
        index = -1 - index if index < 0 else 2 * length - 1 - index
    return index


def loop_smooth(rows: np.ndarray) -> np.ndarray:
    out = np.zeros(rows.shape, dtype=np.float64)
    for r, row in enumerate(rows.astype(np.float64)):
        for i in range(len(row)):
            for shift, tap in enumerate(KERNEL):
                out[r, i] += tap * row[reflected(i + shift - 2, len(row))]
    return out


def grads_of(a: np.ndarray, b: np.ndarray, head: np.ndarray) -> NoisedGrads:
    arrays = {A_NAME: a, B_NAME: b, HEAD_NAME: head}
    return NoisedGrads({name: torch.from_numpy(array) for name, array in arrays.items()})


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_the_loops_padding_equals_numpys(length):
    row = drawn(np.random.default_rng(length), length)
    padded = np.pad(row, 2, mode="symmetric")
    expected = np.convolve(padded, KERNEL, mode="valid")
    np.testing.assert_allclose(loop_smooth(row[None])[0], expected, atol=1e-14)


@given(
    rows=st.integers(1, 5),
    length=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_smooth_equals_the_loop(rows, length, seed):
    x = drawn(np.random.default_rng(seed), rows, length)
    np.testing.assert_allclose(smooth(torch.from_numpy(x)), loop_smooth(x), atol=1e-13)
    single = smooth(torch.from_numpy(x).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, loop_smooth(x), atol=1e-5)


def test_factors_of_mixed_shapes_are_filtered_independently():
    rng = np.random.default_rng(0)
    shapes = {"q.lora_A": (2, 9), "k.lora_A": (2, 9), "up.lora_A": (3, 4), "v.lora_A": (2, 9)}
    shapes |= {"q.lora_B": (9, 2), "up.lora_B": (7, 3), "v.lora_B": (9, 2), "one.lora_B": (1, 1)}
    arrays = {f"{name}.weight": drawn(rng, *shape) for name, shape in shapes.items()}
    filtered = binomial(NoisedGrads({n: torch.from_numpy(a) for n, a in arrays.items()}))
    assert list(filtered) == list(arrays)
    for name, array in arrays.items():
        expected = loop_smooth(array) if "lora_A" in name else loop_smooth(array.T).T
        np.testing.assert_allclose(filtered[name], expected, atol=1e-13)


@given(
    rank=st.integers(1, 4),
    inputs=st.integers(1, 10),
    outputs=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_each_factor_is_filtered_along_its_long_axis_and_the_head_not_at_all(
    rank, inputs, outputs, seed
):
    rng = np.random.default_rng(seed)
    a, b, head = drawn(rng, rank, inputs), drawn(rng, outputs, rank), drawn(rng, 2, 6)
    filtered = binomial(grads_of(a, b, head))
    np.testing.assert_allclose(filtered[A_NAME], loop_smooth(a), atol=1e-13)
    np.testing.assert_allclose(filtered[B_NAME], loop_smooth(b.T).T, atol=1e-13)
    np.testing.assert_array_equal(filtered[HEAD_NAME], head)


@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_constant_rows_pass_unchanged(length):
    rows = torch.tensor([[2.5], [-7.0]], dtype=torch.float64).expand(2, length)
    torch.testing.assert_close(smooth(rows), rows)


def test_the_variance_of_inner_noise_is_multiplied_by_70_over_256():
    x = torch.from_numpy(drawn(np.random.default_rng(0), 400, 504))
    interior = smooth(x)[:, 2:-2]
    # 200000 entries, neighbours correlated: the estimate's own error is below 1 %.
    assert interior.var().item() == pytest.approx(70 / 256, rel=0.02)
    assert x.var().item() == pytest.approx(1, rel=0.02)


def test_scaled_shrinks_factors_by_the_filters_noise_factor_and_leaves_the_head():
    rng = np.random.default_rng(1)
    a, b, head = drawn(rng, 2, 5), drawn(rng, 4, 2), drawn(rng, 2, 3)
    shrunk = scaled(grads_of(a, b, head))
    np.testing.assert_allclose(shrunk[A_NAME], math.sqrt(70 / 256) * a, rtol=1e-14)
    np.testing.assert_allclose(shrunk[B_NAME], math.sqrt(70 / 256) * b, rtol=1e-14)
    np.testing.assert_array_equal(shrunk[HEAD_NAME], head)


def test_permuted_is_the_filter_on_features_in_one_fixed_random_order():
    rng = np.random.default_rng(4)
    a, b, head = drawn(rng, 2, 40), drawn(rng, 30, 2), drawn(rng, 2, 3)
    first, again = (permuted(grads_of(a, b, head)) for _ in range(2))
    # Unit vectors show which features the filter treats as neighbours.
    impulses = permuted(grads_of(np.eye(40), b, head))[A_NAME]
    weights = np.sort(impulses, axis=1)[:, ::-1][:, :5]
    inner = [row for row in weights if np.allclose(row, sorted(TAPS, reverse=True))]
    assert len(inner) == 40 - 4  # except features next to a border
    assert not np.allclose(impulses, binomial(grads_of(np.eye(40), b, head))[A_NAME])
    np.testing.assert_allclose(first[A_NAME], a @ impulses.numpy(), atol=1e-12)
    np.testing.assert_array_equal(first[HEAD_NAME], head)
    for name, grad in first.items():
        np.testing.assert_array_equal(grad, again[name])


@pytest.mark.parametrize("postprocess", [binomial, permuted, scaled, identity])
def test_filters_do_not_change_their_input_and_keep_names_and_shapes(postprocess):
    rng = np.random.default_rng(2)
    before = [drawn(rng, 2, 5), drawn(rng, 4, 2), drawn(rng, 2, 3)]
    grads = grads_of(*[array.copy() for array in before])
    after = postprocess(grads)
    assert {n: g.shape for n, g in after.items()} == {n: g.shape for n, g in grads.items()}
    for grad, array in zip(grads.values(), before, strict=True):
        np.testing.assert_array_equal(grad, array)


@pytest.mark.parametrize("postprocess", [binomial, permuted, scaled, identity])
def test_filters_are_linear(postprocess):
    rng = np.random.default_rng(3)
    x = grads_of(drawn(rng, 2, 7), drawn(rng, 6, 2), drawn(rng, 2, 3))
    y = grads_of(drawn(rng, 2, 7), drawn(rng, 6, 2), drawn(rng, 2, 3))
    both = postprocess(NoisedGrads({name: 3 * x[name] - y[name] for name in x}))
    for name in x:
        expected = 3 * postprocess(x)[name] - postprocess(y)[name]
        torch.testing.assert_close(both[name], expected)


# HetLoRA's penalty.


def numbers(decay: float, weight: float):
    return make_config(**{"rule.rank-decay": decay, "rule.tail-penalty": weight}).rule


def size_of_tail(b: np.ndarray, a: np.ndarray, kept: int) -> float:
    """‖B[:, k:]‖·‖A[k:, :]‖, entry by entry."""
    left = sum(float(x) ** 2 for row in b for x in row[kept:])
    right = sum(float(x) ** 2 for row in a[kept:] for x in row)
    return math.sqrt(left) * math.sqrt(right)


def slope_by_differences(b: np.ndarray, a: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the tail's size by every entry, by central differences."""
    slopes, step = (np.zeros_like(b), np.zeros_like(a)), 1e-6
    for which, slope in enumerate(slopes):
        for place in np.ndindex(slope.shape):
            pair, ends = (b.copy(), a.copy()), []
            for moved in (step, -2 * step):
                pair[which][place] += moved
                ends.append(size_of_tail(*pair, kept))
            slope[place] = (ends[0] - ends[1]) / (2 * step)
    return slopes


@pytest.mark.parametrize(("rank", "decay", "kept"), [(4, 0.99, 3), (4, 0.5, 2), (5, 0.2, 1)])
def test_the_penalty_has_the_gradient_of_the_size_of_the_tail(rank, decay, kept):
    rng, weight = np.random.default_rng(rank), 0.3
    a, b, head = drawn(rng, rank, 6), drawn(rng, 5, rank), drawn(rng, 2, 3)
    noised = grads_of(drawn(rng, rank, 6), drawn(rng, 5, rank), head)
    found = tail_penalty(noised, grads_of(a, b, head), numbers(decay, weight))
    slopes = dict(zip((B_NAME, A_NAME), slope_by_differences(b, a, kept), strict=True))
    for name, slope in slopes.items():
        added = (found[name] - noised[name]).numpy()
        np.testing.assert_allclose(added, weight * slope, atol=1e-8)
    assert not (found[A_NAME] - noised[A_NAME])[:kept].any()
    assert torch.equal(found[HEAD_NAME], noised[HEAD_NAME])


def test_the_penalty_leaves_resting_tensors_and_its_inputs_alone():
    rng = np.random.default_rng(0)
    tensors = grads_of(drawn(rng, 4, 6), drawn(rng, 5, 4), drawn(rng, 2, 3))
    noised = NoisedGrads({B_NAME: torch.from_numpy(drawn(rng, 5, 4))})
    before = noised[B_NAME].clone()
    found = tail_penalty(noised, tensors, numbers(0.5, 1.0))
    assert set(found) == {B_NAME}
    assert torch.equal(noised[B_NAME], before)
    assert not torch.equal(found[B_NAME], before)


@pytest.mark.parametrize(("decay", "weight"), [(1.0, 5.0), (0.5, 0.0)])
def test_without_a_tail_or_a_weight_there_is_no_penalty(decay, weight):
    rng = np.random.default_rng(0)
    tensors = grads_of(drawn(rng, 4, 6), drawn(rng, 5, 4), drawn(rng, 2, 3))
    for penalty in (tail_penalty, no_penalty):
        assert penalty(tensors, tensors, numbers(decay, weight)) is tensors


@pytest.mark.parametrize("zero", [A_NAME, B_NAME])
def test_the_penalty_of_a_zero_factor_is_finite(zero):
    rng = np.random.default_rng(0)
    tensors = grads_of(drawn(rng, 4, 6), drawn(rng, 5, 4), drawn(rng, 2, 3))
    tensors[zero] = torch.zeros_like(tensors[zero])
    found = tail_penalty(tensors, tensors, numbers(0.5, 1.0))
    assert all(torch.equal(found[name], x) for name, x in tensors.items())


def test_a_rank_of_one_has_no_tail():
    rng = np.random.default_rng(0)
    tensors = grads_of(drawn(rng, 1, 6), drawn(rng, 5, 1), drawn(rng, 2, 3))
    found = tail_penalty(tensors, tensors, numbers(0.5, 1.0))
    assert all(torch.equal(found[name], x) for name, x in tensors.items())
