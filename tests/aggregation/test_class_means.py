"""The head of class sums: against plain loops in float64, and in its limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import make_config
from lalora_app.aggregation.class_means import class_means_head, head_of_class_sums
from lalora_app.aggregation.rule import RoundInfo

WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"
INFO = RoundInfo(t=1, rounds=3, seed=0, numbers=make_config().rule)


def sums_of(classes: int, features: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(classes, features)).astype("f4")
    return {WEIGHT: weight, BIAS: rng.random(classes).astype("f4")}


def slow_head(sums):
    """The formula of the docstring, entry by entry; a head without bias has no last entry."""
    rows = [[float(x) for x in row] for row in sums[WEIGHT]]
    if BIAS in sums:
        rows = [[*row, float(b)] for row, b in zip(rows, sums[BIAS], strict=True)]
    for row in rows:
        length = math.sqrt(sum(x * x for x in row))
        row[:] = [x / length if length else 0.0 for x in row]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    rows = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
    size = math.sqrt(sum(x * x for row in rows for x in row) / len(rows))
    return np.array([[x / size for x in row] for row in rows])


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_head_is_that_of_the_plain_formula(classes, with_bias):
    sums = sums_of(classes, 5)
    sums = sums if with_bias else {WEIGHT: sums[WEIGHT]}
    head, slow = head_of_class_sums(sums), slow_head(sums)
    assert {name: (x.shape, x.dtype) for name, x in head.items()} == {
        name: (x.shape, x.dtype) for name, x in sums.items()
    }
    np.testing.assert_allclose(head[WEIGHT], slow[:, :5], atol=1e-6)
    if with_bias:
        np.testing.assert_allclose(head[BIAS], slow[:, 5], atol=1e-6)


def test_it_predicts_the_class_whose_mean_has_the_smallest_angle_to_the_feature():
    sums, rng = sums_of(4, 6), np.random.default_rng(1)
    head = head_of_class_sums(sums)
    means = np.column_stack([sums[WEIGHT], sums[BIAS]]).astype(float)
    for feature in rng.normal(size=(50, 6)):
        longer = np.append(feature, 1.0)
        cosines = means @ longer / np.linalg.norm(means, axis=1)
        assert np.argmax(head[WEIGHT] @ feature + head[BIAS]) == np.argmax(cosines)


@settings(deadline=None)
@given(arrays(np.float64, 4, elements=st.floats(1e-3, 1e3)))
def test_the_size_of_a_class_has_no_effect(sizes):
    sums = sums_of(4, 3)
    scaled = {
        name: (x.T * sizes).T.astype("f4") for name, x in sums.items()
    }  # more examples of the same direction
    plain, other = head_of_class_sums(sums), head_of_class_sums(scaled)
    for name in plain:
        np.testing.assert_allclose(other[name], plain[name], atol=1e-5)


def test_a_class_without_example_has_less_than_the_mean_of_the_others_logits():
    sums = {WEIGHT: np.array([[0, 0], [3, 4], [4, 3]], "f4"), BIAS: np.array([0, 1, 1], "f4")}
    head = head_of_class_sums(sums)
    logits = head[WEIGHT] @ np.array([3.0, 3.0]) + head[BIAS]
    assert logits[0] < min(logits[1:])


@pytest.mark.parametrize("same", [0.0, 1.0])
def test_equal_directions_make_a_zero_head(same):
    head = head_of_class_sums({WEIGHT: np.full((3, 2), same, "f4"), BIAS: np.full(3, same, "f4")})
    assert all(not x.any() for x in head.values())


def test_the_clients_sums_are_averaged_by_weight_and_all_else_stays():
    one, two = sums_of(3, 4, 1), sums_of(3, 4, 2)
    current = {"x.lora_A.weight": np.ones((1, 2), "f4"), **sums_of(3, 4, 3)}
    new = class_means_head(current, [1.0, 3.0], [one, two], INFO)
    mean = {name: (0.25 * one[name] + 0.75 * two[name]).astype("f4") for name in one}
    assert new.fold == {}
    assert new.adapter["x.lora_A.weight"] is current["x.lora_A.weight"]
    for name, expected in head_of_class_sums(mean).items():
        np.testing.assert_allclose(new.adapter[name], expected, atol=1e-6)
