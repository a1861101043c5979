"""Test FedEx-LoRA and LoRA-FAIR against dense optima."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.server_rules import (
    AS,
    BS,
    FEW,
    PAIRS,
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
    tail,
    wanted,
    wide,
)
from lalora_app.adapter.factors import Adapter
from lalora_app.aggregation import residual_correction
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.residual_correction import (
    corrected_average,
    cosine_correction,
    residual_fold,
    ridge_correction,
)

fair_ridge = corrected_average(ridge_correction)
fair_cosine = corrected_average(cosine_correction)


@given(seed=SEEDS, clients=st.integers(2, 5), scale=st.sampled_from([0.5, 2.0]))
@FEW
def test_averaging_loses_the_covariance_of_the_factors_and_fedex_folds_it(seed, clients, scale):
    found = case(seed, clients)
    plain, fedex = Scene(federated_averaging).run(found), Scene(residual_fold).run(found)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        b_mean, a_mean = mean_of(found, b), mean_of(found, a)
        covariance = sum(
            p * (wide(client[b]) - b_mean) @ (wide(client[a]) - a_mean)
            for p, client in zip(found.shares(), found.clients, strict=True)
        )
        lost = scale * wanted(found, path) - scale * b_mean @ a_mean
        np.testing.assert_allclose(scale * covariance, lost, atol=1e-12)
        size = np.linalg.norm(wanted(found, path))
        off = wanted(found, path) - got(plain, path)
        np.testing.assert_allclose(off, covariance, atol=1e-6 * size)
        np.testing.assert_allclose(product(fedex.fold, path), covariance, atol=1e-6 * size)
        np.testing.assert_array_equal(fedex.adapter[b], plain.adapter[b])
        np.testing.assert_array_equal(fedex.adapter[a], plain.adapter[a])


def test_fedex_folds_nothing_where_the_clients_agree():
    found = case(0, 1)
    found.clients, found.weights = found.clients * 2, [1.0, 3.0]
    fold = Scene(residual_fold).run(found).fold
    assert all(not array.any() for array in fold.values())


def fedex(found: Case, residual_rank: int):
    info = at(residual_rank=residual_rank)
    return residual_fold(found.current, found.weights, found.uploads("AB"), info)


@given(seed=SEEDS, clients=st.integers(2, 5), rank=st.integers(1, 4))
@FEW
def test_a_cut_residual_is_the_best_of_its_rank(seed, clients, rank):
    """Eckart-Young: the error is the root of the sum of squares of the other singular values."""
    found = case(seed, clients)
    cut, whole = fedex(found, rank), fedex(found, 0)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        lost = wanted(found, path) - mean_of(found, b) @ mean_of(found, a)
        left = np.linalg.norm(wanted(found, path) - got(cut, path))
        assert left == pytest.approx(tail(lost, rank), abs=1e-6 * np.linalg.norm(lost))
        assert cut.fold[a].shape[0] == min(rank, whole.fold[a].shape[0])
        np.testing.assert_array_equal(cut.adapter[b], whole.adapter[b])


def test_a_rank_that_holds_the_whole_residual_changes_no_bit():
    found = case(0)
    whole = fedex(found, 0).fold
    for rank in (9, 50):
        same = fedex(found, rank).fold
        assert all(same[name].tobytes() == array.tobytes() for name, array in whole.items())


def fair(rule, found: Case, fair_weight: float) -> Adapter:
    return rule(
        found.current, found.weights, found.uploads("AB"), at(fair_weight=fair_weight)
    ).adapter


def least_squares(target: np.ndarray, a_mean: np.ndarray, weight: float) -> np.ndarray:
    """argmin ‖target − D·Ā‖² + weight·‖D‖², row by row, as one dense least-squares problem."""
    rank = len(a_mean)
    rows = np.concatenate([a_mean.T, np.sqrt(weight) * np.eye(rank)])  # (n + r, r)
    goals = np.concatenate([target.T, np.zeros((rank, len(target)))])
    return np.linalg.lstsq(rows, goals)[0].T


@given(seed=SEEDS, fair_weight=st.sampled_from([1e-3, 0.01, 0.3, 5.0]))
@FEW
def test_the_ridge_correction_is_the_dense_optimum(seed, fair_weight):
    found = case(seed)
    adapter = fair(fair_ridge, found, fair_weight)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        b_mean, a_mean = mean_of(found, b), mean_of(found, a)
        weight = fair_weight * np.mean(np.linalg.svd(a_mean, compute_uv=False) ** 2)
        change = least_squares(wanted(found, path) - b_mean @ a_mean, a_mean, weight)
        np.testing.assert_allclose(adapter[b], b_mean + change, atol=1e-6 * np.abs(b_mean).max())
        assert_near(adapter[a], a_mean)
        assert np.linalg.norm(change) > 1e-2 * np.linalg.norm(b_mean)


@given(seed=SEEDS, clients=st.integers(1, 5), fair_weight=st.floats(0, 1e6))
@FEW
def test_ridge_never_leaves_more_than_averaging(seed, clients, fair_weight):
    found = case(seed, clients)
    adapter, plain = (
        fair(fair_ridge, found, fair_weight),
        Scene(federated_averaging).run(found).adapter,
    )
    for path in SIZES:
        whole = wanted(found, path)
        left, before = (np.linalg.norm(whole - product(x, path)) for x in (adapter, plain))
        assert left <= before + 1e-6 * np.linalg.norm(whole)


@given(seed=SEEDS, fair_weight=st.sampled_from([0.0, 1e-9]))
@FEW
def test_ridge_without_weight_is_the_best_b_for_the_mean_a(seed, fair_weight):
    found = case(seed)
    adapter = fair(fair_ridge, found, fair_weight)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        best = np.linalg.lstsq(mean_of(found, a).T, wanted(found, path).T)[0].T
        assert_near(adapter[b], best, 1e-5)


@pytest.mark.parametrize("rule", [fair_ridge, fair_cosine])
@given(seed=SEEDS, clients=st.integers(1, 5))
@FEW
def test_with_infinite_weight_fair_is_averaging_to_the_bit(rule, seed, clients):
    found = case(seed, clients)
    adapter = fair(rule, found, float("inf"))
    for name, array in Scene(federated_averaging).run(found).adapter.items():
        np.testing.assert_array_equal(adapter[name], array)


DEGENERATE = {
    "all A are zero": lambda client, sign: {a: 0 * client[a] for a in AS},
    "all B are zero": lambda client, sign: {b: 0 * client[b] for b in BS},
    "A cancels in the mean": lambda client, sign: {a: sign * np.ones_like(client[a]) for a in AS},
    "B cancels in the mean": lambda client, sign: {b: sign * np.ones_like(client[b]) for b in BS},
    "rows of A repeat": lambda client, sign: {a: client[a][[0, 0, 1]] for a in AS},
}


@pytest.mark.parametrize("rule", [fair_ridge, fair_cosine])
@pytest.mark.parametrize("fair_weight", [0.0, 0.01, float("inf")])
@pytest.mark.parametrize("how", DEGENERATE.values(), ids=DEGENERATE)
def test_where_the_means_say_little_fair_is_still_no_worse_than_averaging(rule, fair_weight, how):
    found = case(1, 2)
    found.weights = [1.0, 1.0]
    for client, sign in zip(found.clients, np.float32([1, -1]), strict=True):
        client |= how(client, sign)
    adapter, plain = fair(rule, found, fair_weight), Scene(federated_averaging).run(found).adapter
    for path in SIZES:
        whole = wanted(found, path)
        if rule is fair_ridge:
            left, before = (np.linalg.norm(whole - product(x, path)) for x in (adapter, plain))
            assert left <= before + 1e-6 * np.linalg.norm(whole)
        else:
            assert similarity(adapter, whole, path) >= similarity(plain, whole, path) - 1e-7


def test_without_weight_the_ridge_correction_is_the_smallest_of_the_best():
    found = case(2)
    for client in found.clients:
        client |= {a: client[a][[0, 0, 1]] for a in AS}
    adapter = fair(fair_ridge, found, 0.0)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        b_mean, a_mean = mean_of(found, b), mean_of(found, a)
        change = (wanted(found, path) - b_mean @ a_mean) @ np.linalg.pinv(a_mean, rcond=1e-6)
        assert_near(adapter[b], b_mean + change, 1e-5)


def cosine_of(first: np.ndarray, second: np.ndarray) -> float:
    sizes = np.linalg.norm(first) * np.linalg.norm(second)
    return float(np.sum(first * second) / sizes) if sizes > 0 else 0.0


def similarity(adapter: Adapter, whole: np.ndarray, path: str) -> float:
    return cosine_of(product(adapter, path), whole)


@given(seed=SEEDS, clients=st.integers(2, 5))
@FEW
def test_without_weight_the_cosine_correction_turns_towards_the_mean_product(seed, clients):
    found = case(seed, clients)
    adapter, plain = fair(fair_cosine, found, 0.0), Scene(federated_averaging).run(found).adapter
    for path, (_, a) in zip(SIZES, PAIRS, strict=True):
        whole, rows = wanted(found, path), np.linalg.qr(mean_of(found, a).T)[0]
        best = np.linalg.norm(whole @ rows) / np.linalg.norm(whole)  # of any B on the mean A
        before, after = similarity(plain, whole, path), similarity(adapter, whole, path)
        assert before < after <= best + 1e-7
        assert best - after < 0.9 * (best - before)


def descent(found: Case, path: str, b: str, a: str, fair_weight: float) -> np.ndarray:
    """The best of the same descent along the finite differences of the dense loss."""
    whole, b_mean, a_mean = wanted(found, path), mean_of(found, b), mean_of(found, a)

    def loss(change: np.ndarray) -> float:
        turned = cosine_of(whole, (b_mean + change) @ a_mean)
        return 1 - turned + fair_weight * float(np.linalg.norm(change))

    def slope(change: np.ndarray) -> np.ndarray:
        grads, h = np.zeros(change.size), 1e-6
        for i in range(change.size):
            step = h * np.eye(1, change.size, i).reshape(change.shape)
            grads[i] = (loss(change + step) - loss(change - step)) / (2 * h)
        return grads.reshape(change.shape)

    changes = [np.zeros_like(b_mean)]
    for _ in range(residual_correction._COSINE_STEPS - 1):
        rate = residual_correction._COSINE_RATE * np.sum(b_mean**2)
        changes.append(changes[-1] - rate * slope(changes[-1]))
    return b_mean + min(changes, key=loss)


@pytest.mark.parametrize("fair_weight", [0.0, 0.05])
def test_the_cosine_correction_descends_the_dense_loss(fair_weight):
    found = case(3)
    adapter = fair(fair_cosine, found, fair_weight)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        expected = descent(found, path, b, a, fair_weight)
        assert np.linalg.norm(expected - mean_of(found, b)) > 1e-2
        assert_near(adapter[b], expected, 1e-5)


@given(seed=SEEDS, fair_weight=st.sampled_from([0.01, 1.0, 100.0, 1e6]))
@FEW
def test_the_cosine_correction_is_no_larger_than_its_weight_allows(seed, fair_weight):
    """λ‖D‖ is at most what D gains in similarity; so a large λ ends in the plain average."""
    found = case(seed)
    adapter = fair(fair_cosine, found, fair_weight)
    for path, (b, a) in zip(SIZES, PAIRS, strict=True):
        whole, b_mean, a_mean = wanted(found, path), mean_of(found, b), mean_of(found, a)
        gain = similarity(adapter, whole, path) - cosine_of(b_mean @ a_mean, whole)
        size = np.linalg.norm(adapter[b] - b_mean)
        rounding = 1e-6 * np.linalg.norm(b_mean)
        assert size <= (gain + 1e-6) / fair_weight + rounding
