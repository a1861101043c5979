"""Test FlexLoRA, FedSVD and DEeR: other factors of the same product."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_config
from helpers.server_rules import (
    BS,
    FEW,
    HEAD,
    PAIRS,
    RANK,
    SEEDS,
    SIZES,
    WIDE,
    Scene,
    assert_near,
    case,
    drawn,
    got,
    mean_of,
    numbers,
    resting,
    spans,
    tail,
    wanted,
    wide,
)
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.new_factors import (
    orthonormal_resting_factor,
    product_mean,
    start_orthonormal,
    svd_of_mean_b,
)
from lalora_app.aggregation.rule import RoundInfo


@given(seed=SEEDS, ranks=st.permutations([4, 8, 16]))
@FEW
def test_flexlora_loses_the_smallest_singular_values_of_mixed_ranks(seed, ranks):
    found = case(seed, ranks=ranks, sizes=WIDE)
    adapter = Scene(product_mean).run(found).adapter
    for path, (b, a) in zip(WIDE, PAIRS, strict=True):
        whole = wanted(found, path)
        for kept in (16, 8, 4, 1):  # a smaller rank is the first of a larger
            left = whole - wide(adapter[b][:, :kept]) @ wide(adapter[a][:kept])
            assert tail(whole, kept) > 1e-3 * np.linalg.norm(whole)
            assert np.linalg.norm(left) == pytest.approx(tail(whole, kept), rel=1e-5)


@given(seed=SEEDS)
@FEW
def test_flexlora_loses_nothing_while_the_ranks_add_up_to_its_own(seed):
    found = case(seed, ranks=[4, 4, 8, 16], sizes=WIDE)
    found.clients, found.weights = found.clients[:3], found.weights[:3]  # 4 + 4 + 8 = 16
    result = Scene(product_mean).run(found)
    for path in WIDE:
        assert_near(got(result, path), wanted(found, path))


@given(seed=SEEDS, clients=st.integers(1, 4))
@FEW
def test_fedsvd_leaves_orthonormal_rows_and_the_scale_in_b(seed, clients):
    found = case(seed, clients, "B")
    adapter = Scene(svd_of_mean_b, "B").run(found).adapter
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        singular = np.linalg.svd(wanted(found, path), compute_uv=False)[:RANK]
        rows, columns = wide(adapter[a]), wide(adapter[b])
        np.testing.assert_allclose(rows @ rows.T, np.eye(RANK), atol=1e-6)
        scales = np.diag(singular**2)
        np.testing.assert_allclose(columns.T @ columns, scales, atol=1e-6 * singular[0] ** 2)


def test_fedsvd_waits_for_the_end_of_its_period_and_for_a_product():
    found = case(0, travelling="B")
    mean = Scene(federated_averaging, "B").run(found).adapter
    zero = case(0, travelling="B")
    for client in zero.clients:
        client |= {b: np.zeros_like(client[b]) for b in BS}
    for t in (1, 2, 4):
        early = Scene(svd_of_mean_b, "B", t=t, period=3).run(found).adapter
        assert all(np.array_equal(early[name], mean[name]) for name in early)
    adapter = Scene(svd_of_mean_b, "B", t=3, period=3).run(zero).adapter
    for b, a in PAIRS:
        assert not np.array_equal(
            Scene(svd_of_mean_b, "B", t=3, period=3).run(found).adapter[a], mean[a]
        )
        assert not adapter[b].any()
        np.testing.assert_array_equal(adapter[a], found.current[a])


@pytest.mark.parametrize("rule", [svd_of_mean_b, orthonormal_resting_factor, product_mean])
def test_a_rank_of_the_smaller_side_keeps_its_product_and_shapes(rule):
    found = case(0, 1, ranks=[4], sizes=dict.fromkeys(SIZES, (4, 9)))
    result = Scene(rule, "AB").run(found)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        assert (result.adapter[b].shape, result.adapter[a].shape) == ((4, 4), (4, 9))
        assert_near(got(result, path), wanted(found, path))


@given(seed=SEEDS, t=st.integers(1, 8), clients=st.integers(1, 4))
@FEW
def test_deer_leaves_an_orthonormal_resting_factor_of_the_same_span(seed, t, clients):
    found = case(seed, clients, "B" if t % 2 else "A")
    adapter = Scene(orthonormal_resting_factor, "B" if t % 2 else "A", t=t).run(found).adapter
    for columns, (b, a) in zip(resting(adapter, t), PAIRS, strict=True):
        np.testing.assert_allclose(columns.T @ columns, np.eye(RANK), atol=1e-6)
        assert spans(columns, mean_of(found, b) if t % 2 else mean_of(found, a).T)


@pytest.mark.parametrize("zeros", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("t", [1, 2])
def test_deer_keeps_the_product_of_a_factor_without_full_rank(t, zeros):
    travelling = "B" if t % 2 else "A"
    found = case(0, 3, travelling)
    for client in found.clients:
        for b, a in PAIRS:
            client[b], client[a] = client[b].copy(), client[a].copy()
            (client[b] if t % 2 else client[a].T)[:, zeros] = 0
    result = Scene(orthonormal_resting_factor, travelling, t=t).run(found)
    for path in SIZES:
        assert_near(got(result, path), wanted(found, path))
    for columns in resting(result.adapter, t):
        np.testing.assert_allclose(columns.T @ columns, np.eye(RANK), atol=1e-6)


@given(seed=SEEDS)
@FEW
def test_in_the_geometry_of_deer_a_change_is_as_large_as_its_product(seed):
    found, rng = case(seed, 2), np.random.default_rng(seed)
    for t in (1, 2):
        adapter = Scene(orthonormal_resting_factor, t=t).run(found).adapter
        for b, a in PAIRS:
            moving = a if t % 2 else b  # in round t + 1
            change = rng.standard_normal(adapter[moving].shape)
            whole = adapter[b] @ change if t % 2 else change @ adapter[a]
            assert np.linalg.norm(whole) == pytest.approx(np.linalg.norm(change), rel=1e-6)


@given(seed=SEEDS)
@FEW
def test_deer_starts_from_orthonormal_rows_and_a_zero_product(seed):
    start = drawn(np.random.default_rng(seed))
    start |= {b: np.zeros_like(start[b]) for b in BS}
    before = {name: array.tobytes() for name, array in start.items()}
    changed = start_orthonormal(start, numbers())
    for b, a in PAIRS:
        np.testing.assert_allclose(wide(changed[a]) @ changed[a].T, np.eye(RANK), atol=1e-6)
        assert spans(changed[a].T, start[a].T)
        np.testing.assert_array_equal(changed[b], start[b])
        assert changed[a].dtype == changed[b].dtype == np.float32
    np.testing.assert_array_equal(changed[HEAD], start[HEAD])
    assert before == {name: array.tobytes() for name, array in start.items()}


def test_flexlora_leaves_no_direction_with_two_zero_factors():
    rng = np.random.default_rng(0)
    b, a = "l.lora_B.weight", "l.lora_A.weight"
    draw = rng.standard_normal
    current = {b: np.zeros((6, 4), "f4"), a: draw((4, 5)).astype("f4")}
    upload = {b: draw((6, 1)).astype("f4"), a: draw((1, 5)).astype("f4")}
    info = RoundInfo(t=1, rounds=1, seed=0, numbers=make_config().rule)
    new = product_mean(current, [1.0], [upload], info).adapter
    assert np.allclose(new[b] @ new[a], upload[b] @ upload[a], atol=1e-5)
    assert all(row.any() for row in new[a])
    assert np.array_equal(new[a][1:], current[a][1:])
