"""How far averaging the factors apart is from the truth, against dense products in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.adapter.factors import Adapter
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.measured_error import aggregation_error

HEAD = "base_model.model.classifier.weight"


def names(layer: int) -> tuple[str, str]:
    path = f"base_model.model.layer.{layer}.query"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


LAYERS = [names(layer) for layer in range(3)]


def drawn(rng: np.random.Generator, shapes: list[tuple[int, int, int]]) -> Adapter:
    """An upload of layers of (outputs, rank, inputs), in float32, with a head."""
    upload = {HEAD: rng.standard_normal((2, 3)).astype(np.float32)}
    for (a, b), (outputs, rank, inputs) in zip(LAYERS, shapes, strict=False):
        upload[a] = rng.standard_normal((rank, inputs)).astype(np.float32)
        upload[b] = rng.standard_normal((outputs, rank)).astype(np.float32)
    return upload


def products(adapter: Adapter, layers: int, scale: float) -> np.ndarray:
    """Every entry of scale · B A of every layer, one after the other."""
    wide = {name: array.astype(np.float64) for name, array in adapter.items()}
    return np.concatenate([(scale * wide[b] @ wide[a]).ravel() for a, b in LAYERS[:layers]])


def by_products(weights, uploads, layers: int, scale: float = 1.0) -> float:
    """‖Σ p_k sB_kA_k - sB̄Ā‖ / ‖Σ p_k sB_kA_k‖: the mean of the products, and that of the means."""
    shares = [weight / sum(weights) for weight in weights]
    truth = sum(
        p * products(upload, layers, scale) for p, upload in zip(shares, uploads, strict=True)
    )
    means = {
        name: sum(p * u[name].astype(np.float64) for p, u in zip(shares, uploads, strict=True))
        for pair in LAYERS[:layers]
        for name in pair
    }
    return float(np.linalg.norm(truth - products(means, layers, scale)) / np.linalg.norm(truth))


@dataclass
class Case:
    """Uploads of some clients and their weights."""

    weights: list[float]
    uploads: list[Adapter]
    layers: int


@st.composite
def cases(draw) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = draw(st.lists(st.floats(0.1, 100), min_size=1, max_size=5))
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9))
    shapes = draw(st.lists(sizes, min_size=1, max_size=3))
    return Case(weights, [drawn(rng, shapes) for _ in weights], len(shapes))


@given(case=cases(), scale=st.sampled_from([0.5, 1.0, 16.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_it_is_the_definition_over_dense_products_whatever_the_scale(case, scale):
    found = aggregation_error(case.weights, case.uploads)
    expected = by_products(case.weights, case.uploads, case.layers, scale)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert type(found) is float


@given(case=cases(), factor=st.sampled_from([1e-3, 64.0]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_neither_the_order_nor_the_size_of_the_weights_counts(case, factor):
    found = aggregation_error(case.weights, case.uploads)
    scaled = aggregation_error([factor * w for w in case.weights], case.uploads)
    turned = aggregation_error(case.weights[::-1], case.uploads[::-1])
    assert (scaled, turned) == pytest.approx((found, found), rel=1e-6, abs=1e-6)


def test_it_is_what_the_aggregate_of_the_run_loses():
    rng = np.random.default_rng(0)
    weights, uploads = [1.0, 2.0, 5.0], [drawn(rng, [(6, 2, 5)]) for _ in range(3)]
    merged = weighted_mean(uploads[0], weights, uploads)
    truth = sum(w * products(u, 1, 1.0) for w, u in zip(weights, uploads, strict=True)) / 8
    off = np.linalg.norm(truth - products(merged, 1, 1.0)) / np.linalg.norm(truth)
    assert off > 0.1
    assert aggregation_error(weights, uploads) == pytest.approx(off, rel=1e-5)


@given(case=cases(), which=st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_clients_that_agree_on_a_factor_lose_nothing(case, which):
    shared = {pair[which]: case.uploads[0][pair[which]] for pair in LAYERS[: case.layers]}
    uploads = [upload | shared for upload in case.uploads]
    assert aggregation_error(case.weights, uploads) == pytest.approx(0, abs=1e-9)


@given(case=cases())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_one_client_loses_nothing(case):
    assert aggregation_error(case.weights[:1], case.uploads[:1]) == 0.0


def test_factors_at_zero_lose_nothing():
    upload = drawn(np.random.default_rng(0), [(4, 2, 3)])
    upload[names(0)[1]] *= 0
    assert aggregation_error([1.0, 1.0], [upload, upload]) == 0.0


def test_opposite_clients_lose_everything():
    """Means of zero: B̄Ā is 0, and Σ p_k B_k A_k is not."""
    upload = drawn(np.random.default_rng(0), [(4, 2, 3)])
    opposite = {name: -array for name, array in upload.items()}
    assert aggregation_error([1.0, 1.0], [upload, opposite]) == pytest.approx(1.0)


@pytest.mark.parametrize("missing", [".lora_A.", ".lora_B.", ".lora_"])
def test_without_one_of_the_factors_nothing_can_be_said(missing):
    rng = np.random.default_rng(0)
    uploads = [drawn(rng, [(4, 2, 3), (3, 2, 4)]) for _ in range(2)]
    partial = [{n: a for n, a in upload.items() if missing not in n} for upload in uploads]
    assert aggregation_error([1.0, 1.0], partial) is None
