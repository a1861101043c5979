"""The measured error of averaging A and B separately, compared with dense float64 products."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.adapter.factors import Adapter
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.measured_error import aggregation_error, aggregation_errors
from lalora_app.aggregation.rule import Aggregated

HEAD = "base_model.model.classifier.weight"


def names(layer: int) -> tuple[str, str]:
    path = f"base_model.model.layer.{layer}.query"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


LAYERS = [names(layer) for layer in range(3)]


def drawn(rng: np.random.Generator, shapes: list[tuple[int, int, int]]) -> Adapter:
    """Draw an upload with layers of (outputs, rank, inputs) and a head, in float32."""
    upload = {HEAD: rng.standard_normal((2, 3)).astype(np.float32)}
    for (a, b), (outputs, rank, inputs) in zip(LAYERS, shapes, strict=False):
        upload[a] = rng.standard_normal((rank, inputs)).astype(np.float32)
        upload[b] = rng.standard_normal((outputs, rank)).astype(np.float32)
    return upload


def products(adapter: Adapter, layers: int, scale: float) -> np.ndarray:
    """Return all entries of scale · B A of all layers as one vector."""
    wide = {name: array.astype(np.float64) for name, array in adapter.items()}
    return np.concatenate([(scale * wide[b] @ wide[a]).ravel() for a, b in LAYERS[:layers]])


def by_products(weights, uploads, layers: int, scale: float = 1.0) -> float:
    """Return ‖Σ p_k sB_kA_k - sB̄Ā‖ / ‖Σ p_k sB_kA_k‖ from dense products."""
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
    """Uploads and weights of several clients."""

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
def test_the_error_equals_its_definition_by_dense_products_at_any_scale(case, scale):
    found = aggregation_error(case.weights, case.uploads)
    expected = by_products(case.weights, case.uploads, case.layers, scale)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert type(found) is float


@given(case=cases(), factor=st.sampled_from([1e-3, 64.0]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_order_of_clients_and_scale_of_weights_do_not_change_the_error(case, factor):
    found = aggregation_error(case.weights, case.uploads)
    scaled = aggregation_error([factor * w for w in case.weights], case.uploads)
    turned = aggregation_error(case.weights[::-1], case.uploads[::-1])
    assert (scaled, turned) == pytest.approx((found, found), rel=1e-6, abs=1e-6)


def test_the_error_is_the_error_of_federated_averaging():
    rng = np.random.default_rng(0)
    weights, uploads = [1.0, 2.0, 5.0], [drawn(rng, [(6, 2, 5)]) for _ in range(3)]
    merged = weighted_mean(uploads[0], weights, uploads)
    truth = sum(w * products(u, 1, 1.0) for w, u in zip(weights, uploads, strict=True)) / 8
    off = np.linalg.norm(truth - products(merged, 1, 1.0)) / np.linalg.norm(truth)
    assert off > 0.1
    assert aggregation_error(weights, uploads) == pytest.approx(off, rel=1e-5)


@given(case=cases(), which=st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_error_is_zero_if_all_clients_have_one_factor_in_common(case, which):
    shared = {pair[which]: case.uploads[0][pair[which]] for pair in LAYERS[: case.layers]}
    uploads = [upload | shared for upload in case.uploads]
    assert aggregation_error(case.weights, uploads) == pytest.approx(0, abs=1e-9)


@given(case=cases())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_error_of_one_client_is_zero(case):
    assert aggregation_error(case.weights[:1], case.uploads[:1]) == 0.0


def test_the_error_of_zero_factors_is_zero():
    upload = drawn(np.random.default_rng(0), [(4, 2, 3)])
    upload[names(0)[1]] *= 0
    assert aggregation_error([1.0, 1.0], [upload, upload]) == 0.0


def test_the_error_of_opposite_clients_is_one():
    """The means B̄ and Ā are 0, but Σ p_k B_k A_k is not."""
    upload = drawn(np.random.default_rng(0), [(4, 2, 3)])
    opposite = {name: -array for name, array in upload.items()}
    assert aggregation_error([1.0, 1.0], [upload, opposite]) == pytest.approx(1.0)


@pytest.mark.parametrize("missing", [".lora_A.", ".lora_B.", ".lora_"])
def test_the_error_is_none_without_one_of_the_factors(missing):
    rng = np.random.default_rng(0)
    uploads = [drawn(rng, [(4, 2, 3), (3, 2, 4)]) for _ in range(2)]
    partial = [{n: a for n, a in upload.items() if missing not in n} for upload in uploads]
    assert aggregation_error([1.0, 1.0], partial) is None


def test_clients_of_one_rank_below_the_runs_have_no_cosine_and_the_other_errors():
    rng = np.random.default_rng(0)
    before = drawn(rng, [(5, 4, 6)] * 2)
    weights, uploads = [1.0, 3.0], [drawn(rng, [(5, 2, 6)] * 2) for _ in range(2)]
    mean = weighted_mean(before, weights, uploads)
    found = aggregation_errors(weights, uploads, before, Aggregated(mean), complete=True)
    assert found.cosine is None
    assert found.averaging == pytest.approx(by_products(weights, uploads, 2), rel=1e-6)
    assert found.remaining == pytest.approx(found.averaging, rel=1e-5)
