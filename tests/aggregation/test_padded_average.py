"""Test HetLoRA against a loop over padded factors."""

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
    WIDE,
    Case,
    Scene,
    assert_near,
    case,
    mean_of,
    product,
)
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.padded_average import padded_mean


def padded_loop(found: Case, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """HetLoRA's mean, client by client and layer by layer."""
    totals = {name: np.zeros(found.current[name].shape) for name in names}
    mass = 0.0
    for weight, client in zip(found.weights, found.clients, strict=True):
        layers = [np.linalg.norm(product(client, path)) for path in SIZES]
        own = weight * np.sqrt(sum(size**2 for size in layers))
        mass += own
        for name in names:
            rows, columns = client[name].shape
            totals[name][:rows, :columns] += own * client[name]
    return {name: total / mass for name, total in totals.items()}


@given(seed=SEEDS, ranks=st.permutations([4, 8, 16]))
@FEW
def test_hetlora_is_the_loop_over_padded_factors_weighted_by_their_size(seed, ranks):
    found = case(seed, ranks=ranks, sizes=WIDE)
    adapter = Scene(padded_mean).run(found).adapter
    for name, expected in padded_loop(found, (*BS, *AS)).items():
        assert_near(adapter[name], expected)
    assert_near(adapter[HEAD], mean_of(found, HEAD))


@given(seed=SEEDS)
@FEW
def test_hetlora_of_products_of_one_size_is_the_plain_mean(seed):
    found = case(seed)
    for client in found.clients:
        size = np.sqrt(sum(np.sum(product(client, path) ** 2) for path in SIZES))
        client |= {b: (client[b] / size).astype(np.float32) for b in BS}
    padded, plain = Scene(padded_mean).run(found), Scene(federated_averaging).run(found)
    for name, array in plain.adapter.items():
        assert_near(padded.adapter[name], array)


@pytest.mark.parametrize("zero", [BS, AS])
def test_hetlora_of_zero_products_is_the_plain_mean(zero):
    found = case(0)
    for client in found.clients:
        client |= {name: np.zeros_like(client[name]) for name in zero}
    padded, plain = Scene(padded_mean).run(found), Scene(federated_averaging).run(found)
    for name, array in plain.adapter.items():
        np.testing.assert_array_equal(padded.adapter[name], array)


def test_in_hetlora_a_zero_product_has_a_say_in_the_head_only():
    found = case(0, 2)
    found.clients[0] |= {b: np.zeros_like(found.clients[0][b]) for b in BS}
    adapter = Scene(padded_mean).run(found).adapter
    for name in (*BS, *AS):
        np.testing.assert_array_equal(adapter[name], found.clients[1][name])
    assert_near(adapter[HEAD], mean_of(found, HEAD))
