"""Federated averaging, compared with a float64 loop, and the error of the product of means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.adapter.factors import Adapter
from lalora_app.aggregation.average import weighted_mean

A_NAME, B_NAME, HEAD = "q.lora_A.weight", "q.lora_B.weight", "classifier.bias"
SHAPES = {A_NAME: (2, 7), B_NAME: (5, 2), HEAD: (3,)}


def drawn(rng: np.random.Generator) -> Adapter:
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}


def only(adapter: Adapter, *names: str) -> Adapter:
    return {name: adapter[name] for name in names}


def loop_mean(weights, arrays) -> np.ndarray:
    total, mass = np.zeros(arrays[0].shape), 0.0
    for weight, array in zip(weights, arrays, strict=True):
        total += float(weight) * array.astype(np.float64)
        mass += float(weight)
    return total / mass


@given(
    weights=st.lists(st.floats(0.01, 1000), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_mean_equals_a_float64_loop_in_any_order_of_clients(weights, seed):
    rng = np.random.default_rng(seed)
    uploads = [drawn(rng) for _ in weights]
    merged = weighted_mean(drawn(rng), weights, uploads)
    order = rng.permutation(len(weights))
    shuffled = weighted_mean(drawn(rng), [weights[i] for i in order], [uploads[i] for i in order])
    for name in SHAPES:
        expected = loop_mean(weights, [upload[name] for upload in uploads])
        assert merged[name].dtype == np.float32
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(merged[name], shuffled[name], rtol=1e-6, atol=1e-7)


def test_the_mean_depends_on_ratios_of_weights_only():
    rng = np.random.default_rng(0)
    current, uploads = drawn(rng), [drawn(rng) for _ in range(3)]
    first = weighted_mean(current, [1.0, 2.0, 5.0], uploads)
    second = weighted_mean(
        current, [64.0, 128.0, 320.0], uploads
    )  # times 2^6: exact in floating point
    for name in SHAPES:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_client_of_large_weight_dominates_the_mean():
    low, high = np.zeros(3, dtype=np.float32), np.ones(3, dtype=np.float32)
    merged = weighted_mean({HEAD: low}, [3.0, 1.0], [{HEAD: low}, {HEAD: high}])
    np.testing.assert_array_equal(merged[HEAD], np.full(3, 1 / 4, dtype=np.float32))


def test_the_mean_of_one_client_is_its_upload_bit_for_bit():
    rng = np.random.default_rng(1)
    upload = drawn(rng)
    merged = weighted_mean(drawn(rng), [7.0], [upload])
    for name in SHAPES:
        np.testing.assert_array_equal(merged[name], upload[name])


def test_tensors_without_an_upload_stay_the_same_objects():
    rng = np.random.default_rng(2)
    current = drawn(rng)
    before = {name: array.copy() for name, array in current.items()}
    merged = weighted_mean(current, [1.0, 1.0], [only(drawn(rng), B_NAME, HEAD) for _ in range(2)])
    assert set(merged) == set(current)
    assert merged[A_NAME] is current[A_NAME]
    assert not np.array_equal(merged[B_NAME], before[B_NAME])
    for name in SHAPES:
        np.testing.assert_array_equal(current[name], before[name])


def product_of_means_and_mean_of_products(weights, uploads, merged):
    products = [upload[B_NAME].astype(np.float64) @ upload[A_NAME] for upload in uploads]
    product = merged[B_NAME].astype(np.float64) @ merged[A_NAME]
    return product, loop_mean(weights, products)


def test_with_a_shared_a_the_product_of_means_is_the_mean_of_products():
    rng = np.random.default_rng(3)
    current, weights = drawn(rng), [1.0, 2.0, 4.0]
    uploads = [only(drawn(rng), B_NAME, HEAD) for _ in weights]
    merged = weighted_mean(current, weights, uploads)
    whole = [upload | only(current, A_NAME) for upload in uploads]
    product, products = product_of_means_and_mean_of_products(weights, whole, merged)
    np.testing.assert_allclose(product, products, atol=1e-6)


@pytest.mark.parametrize("seed", [4, 5])
def test_with_both_factors_the_error_is_the_covariance_of_the_factors(seed):
    rng = np.random.default_rng(seed)
    weights = [1.0, 2.0, 5.0]
    uploads = [drawn(rng) for _ in weights]
    merged = weighted_mean(drawn(rng), weights, uploads)
    product, products = product_of_means_and_mean_of_products(weights, uploads, merged)
    mean_a = loop_mean(weights, [upload[A_NAME] for upload in uploads])
    mean_b = loop_mean(weights, [upload[B_NAME] for upload in uploads])
    error = loop_mean(weights, [(u[B_NAME] - mean_b) @ (u[A_NAME] - mean_a) for u in uploads])
    assert np.abs(error).max() > 0.1  # averaging both factors is not exact
    np.testing.assert_allclose(products - product, error, atol=1e-5)
