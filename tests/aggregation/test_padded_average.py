"""Test HetLoRA against a loop over padded factors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_config
from helpers.server_rules import (
    AS,
    BS,
    FEW,
    HEAD,
    PAIRS,
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
from lalora_app.aggregation.padded_average import kept_directions, padded_mean, pruned_rank


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


def numbers(decay: float):
    return make_config(**{"rule.rank-decay": decay}).rule


@pytest.mark.parametrize(
    ("rank", "decay", "kept"),
    [
        *((8, 0.99, 7), (8, 0.5, 4), (8, 1.0, 8), (2, 0.99, 1), (1, 0.99, 1), (3, 0.1, 1)),
        *((100, 0.29, 29), (10, 0.7, 7)),  # 0.29·100 is 28.999… in floating point
    ],
)
def test_the_directions_that_stay_are_the_share_of_the_rank_rounded_down(rank, decay, kept):
    assert kept_directions(rank, numbers(decay)) == kept


def tail_of(adapter, kept: int) -> float:
    """Σ ‖B[:, k:]‖·‖A[k:, :]‖ over the layers, entry by entry."""
    total = 0.0
    for b, a in PAIRS:
        left = sum(float(x) ** 2 for row in adapter[b] for x in row[kept:])
        right = sum(float(x) ** 2 for row in adapter[a][kept:] for x in row)
        total += left**0.5 * right**0.5
    return total


@given(seed=SEEDS, decay=st.sampled_from([0.99, 0.6, 0.3]), factor=st.floats(0.5, 2.0))
@FEW
def test_a_rank_shrinks_if_and_only_if_its_tail_has_shrunk(seed, decay, factor):
    found = case(seed, 2, ranks=[6, 6])
    start, upload = found.clients
    upload = {n: (factor * x).astype(np.float32) if n in BS else x for n, x in upload.items()}
    kept = int(decay * 6)
    before, after = tail_of(start, kept), tail_of(upload, kept)
    assert pruned_rank(start, upload, numbers(decay)) == (kept if after < before else 6)


def test_a_rank_stays_without_decay_from_a_zero_start_and_without_a_change():
    start, upload = case(0, 2).clients
    zero = start | {b: np.zeros_like(start[b]) for b in BS}
    half = {n: x / 2 if n in BS else x for n, x in start.items()}
    assert pruned_rank(start, half, numbers(1.0)) == 3
    assert pruned_rank(start, half, numbers(0.99)) == 2
    assert pruned_rank(zero, upload, numbers(0.99)) == 3
    assert pruned_rank(start, start, numbers(0.99)) == 3
