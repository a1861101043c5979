"""Test the laws of every server rule against dense float64 products."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.server_rules import (
    AS,
    BS,
    FEW,
    HEAD,
    SEEDS,
    SIZES,
    Case,
    Scene,
    assert_near,
    at,
    case,
    got,
    mean_of,
    product,
    wanted,
)
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.fold_into_base import (
    chain_fold,
    mirrored_chain_fold,
    stack_fold,
    subspace_fold,
)
from lalora_app.aggregation.new_factors import (
    orthonormal_resting_factor,
    product_mean,
    svd_of_mean_b,
)
from lalora_app.aggregation.padded_average import padded_mean
from lalora_app.aggregation.residual_correction import (
    corrected_average,
    cosine_correction,
    residual_fold,
    ridge_correction,
)
from lalora_app.aggregation.rule import Aggregated

fair_ridge, fair_cosine = corrected_average(ridge_correction), corrected_average(cosine_correction)
EXACT = {
    "FedEx-LoRA": Scene(residual_fold),
    "FLoRA": Scene(stack_fold),
    "RAC-LoRA, end of a block": Scene(chain_fold, "B", t=4, period=2),
    "RAC-LoRA, within a block": Scene(chain_fold, "B", t=3, period=2),
    "RAC-LoRA, mirrored, end of a block": Scene(mirrored_chain_fold, "A", t=4, period=2),
    "RAC-LoRA, mirrored, within a block": Scene(mirrored_chain_fold, "A", t=3, period=2),
    "FedSVD, due": Scene(svd_of_mean_b, "B", t=4, period=2),
    "FedSVD, not due": Scene(svd_of_mean_b, "B", t=3, period=2),
    "subspace, odd": Scene(subspace_fold, "B", t=1),
    "subspace, even": Scene(subspace_fold, "A", t=2),
    "DEeR, odd": Scene(orthonormal_resting_factor, "B", t=1),
    "DEeR, even": Scene(orthonormal_resting_factor, "A", t=2),
    "average of B": Scene(federated_averaging, "B"),
    "average of A": Scene(federated_averaging, "A"),
}
ALL = EXACT | {
    "average": Scene(federated_averaging),
    "FlexLoRA": Scene(product_mean),
    "LoRA-FAIR, ridge": Scene(fair_ridge),
    "LoRA-FAIR, cosine": Scene(fair_cosine),
    "HetLoRA": Scene(padded_mean),
}
exact = pytest.mark.parametrize("scene", EXACT.values(), ids=EXACT)
every = pytest.mark.parametrize("scene", ALL.values(), ids=ALL)


@exact
@given(seed=SEEDS, clients=st.integers(1, 5))
@FEW
def test_nothing_of_the_mean_product_is_lost(scene, seed, clients):
    found = case(seed, clients, scene.travelling)
    result = scene.run(found)
    for path in SIZES:
        assert_near(got(result, path), wanted(found, path))


@every
@given(seed=SEEDS)
@FEW
def test_one_client_gets_its_own_product_and_head_back(scene, seed):
    found = case(seed, 1, scene.travelling)
    result = scene.run(found)
    for path in SIZES:
        assert_near(got(result, path), product(found.clients[0], path))
    np.testing.assert_array_equal(result.adapter[HEAD], found.clients[0][HEAD])


@every
@given(seed=SEEDS, clients=st.integers(1, 5))
@FEW
def test_the_head_is_the_weighted_mean_and_all_is_float32_of_the_same_shapes(scene, seed, clients):
    found = case(seed, clients, scene.travelling)
    result = scene.run(found)
    assert_near(result.adapter[HEAD], mean_of(found, HEAD))
    shapes = {name: array.shape for name, array in found.current.items()}
    assert {name: array.shape for name, array in result.adapter.items()} == shapes
    assert {*result.fold} in (set(), {*BS, *AS})
    for array in (*result.adapter.values(), *result.fold.values()):
        assert array.dtype == np.float32


def assert_same(first: Aggregated, second: Aggregated) -> None:
    """Equal adapters and moves of the base; factors of a move may be in another order."""
    for name, array in first.adapter.items():
        assert_near(second.adapter[name], array, 3e-6)
    for path in SIZES:
        assert_near(got(second, path), got(first, path))


@every
@given(seed=SEEDS, clients=st.integers(1, 5))
@FEW
def test_neither_the_size_of_the_weights_nor_the_order_of_clients_counts(scene, seed, clients):
    found = case(seed, clients, scene.travelling)
    result = scene.run(found)
    larger = Case(found.current, [3.7 * w for w in found.weights], found.clients)
    assert_same(result, scene.run(larger))
    order = np.random.default_rng(seed).permutation(clients)
    turned = Case(
        found.current, [found.weights[i] for i in order], [found.clients[i] for i in order]
    )
    assert_same(result, scene.run(turned))


@every
@given(seed=SEEDS)
@FEW
def test_what_a_rule_is_given_stays_as_it_is(scene, seed):
    found = case(seed, 3, scene.travelling)
    uploads, weights = found.uploads(scene.travelling), list(found.weights)
    given_to = [found.current, *uploads]
    before = [{name: array.tobytes() for name, array in adapter.items()} for adapter in given_to]
    scene.rule(found.current, weights, uploads, at(scene.t, period=scene.period))
    assert weights == found.weights
    assert before == [{n: array.tobytes() for n, array in adapter.items()} for adapter in given_to]


@pytest.mark.parametrize("name", ["average", "FlexLoRA", "LoRA-FAIR, ridge", "HetLoRA"])
def test_the_base_stays_where_a_method_does_not_move_it(name):
    assert ALL[name].run(case(0)).fold == {}
