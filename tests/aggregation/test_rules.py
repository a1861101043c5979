"""The server rules against dense float64 products: what is exact, what is best, and the limits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_config
from lalora_app.adapter.factors import Adapter, select
from lalora_app.aggregation import residual_correction
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.fold_into_base import chain_fold, stack_fold, subspace_fold
from lalora_app.aggregation.new_factors import (
    orthonormal_resting_factor,
    product_mean,
    start_orthonormal,
    svd_of_mean_b,
)
from lalora_app.aggregation.padded_average import padded_mean
from lalora_app.aggregation.residual_correction import (
    corrected_average,
    cosine_correction,
    residual_fold,
    ridge_correction,
)
from lalora_app.aggregation.rule import Aggregated, RoundInfo

HEAD = "base_model.model.classifier.weight"
SIZES = {"base_model.model.layer.0": (6, 9), "base_model.model.layer.1": (11, 8)}
RANK = 3
PAIRS = [(f"{path}.lora_B.weight", f"{path}.lora_A.weight") for path in SIZES]
BS, AS = [b for b, _ in PAIRS], [a for _, a in PAIRS]
FEW = settings(max_examples=12, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)

fair_ridge, fair_cosine = corrected_average(ridge_correction), corrected_average(cosine_correction)


@cache
def numbers(period: int = 1, fair_weight: float = 0.01):
    return make_config(**{"rule.period": period, "rule.fair-weight": fair_weight}).rule


def at(t: int = 1, seed: int = 7, **changes) -> RoundInfo:
    return RoundInfo(t=t, rounds=9, seed=seed, numbers=numbers(**changes))


def drawn(rng: np.random.Generator, rank: int = RANK, sizes=SIZES) -> Adapter:
    adapter = {HEAD: rng.standard_normal((2, 5)).astype(np.float32)}
    for path, (m, n) in sizes.items():
        adapter[f"{path}.lora_A.weight"] = rng.standard_normal((rank, n)).astype(np.float32)
        adapter[f"{path}.lora_B.weight"] = rng.standard_normal((m, rank)).astype(np.float32)
    return adapter


@dataclass
class Case:
    """The global adapter, clients' weights, and all that they know of their adapters."""

    current: Adapter
    weights: list[float]
    clients: list[Adapter]

    def uploads(self, factors: str) -> list[Adapter]:
        return [select(client, frozenset(factors)) for client in self.clients]

    def shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]


def case(seed: int, clients: int = 3, travelling: str = "AB", ranks=None, sizes=SIZES) -> Case:
    """Clients that share the factors that do not travel; weights are uneven."""
    rng = np.random.default_rng(seed)
    ranks = ranks or [RANK] * clients
    current = drawn(rng, max(ranks), sizes)
    own = [select(drawn(rng, rank, sizes), frozenset(travelling)) for rank in ranks]
    whole = [current | upload for upload in own]
    return Case(current, [float(w) for w in rng.uniform(0.1, 10, len(own))], whole)


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def product(adapter: Adapter, path: str) -> np.ndarray:
    """B·A of a layer; zero where there is none."""
    b, a = f"{path}.lora_B.weight", f"{path}.lora_A.weight"
    return wide(adapter[b]) @ wide(adapter[a]) if b in adapter else np.zeros(1)


def wanted(found: Case, path: str) -> np.ndarray:
    """Σ p_k B_k A_k."""
    return sum(
        p * product(client, path) for p, client in zip(found.shares(), found.clients, strict=True)
    )


def got(result: Aggregated, path: str) -> np.ndarray:
    """The product that the next round starts from, and what has moved into the base."""
    return product(result.adapter, path) + product(result.fold, path)


def mean_of(found: Case, name: str) -> np.ndarray:
    """Σ p_k X_k."""
    shares = found.shares()
    return sum(p * wide(client[name]) for p, client in zip(shares, found.clients, strict=True))


def assert_near(found: np.ndarray, expected: np.ndarray, relative: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


def tail(matrix: np.ndarray, rank: int) -> float:
    """The error of the best approximation of a rank (Eckart-Young), by numpy's dense SVD."""
    return float(np.sqrt(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2)))


@dataclass(frozen=True)
class Scene:
    """A rule in a round, and the factors that travel in it."""

    rule: Callable[..., Aggregated]
    travelling: str = "AB"
    t: int = 1
    period: int = 1

    def run(self, found: Case) -> Aggregated:
        uploads = found.uploads(self.travelling)
        return self.rule(found.current, found.weights, uploads, at(self.t, period=self.period))


EXACT = {
    "FedEx-LoRA": Scene(residual_fold),
    "FLoRA": Scene(stack_fold),
    "RAC-LoRA, end of a block": Scene(chain_fold, "B", t=4, period=2),
    "RAC-LoRA, within a block": Scene(chain_fold, "B", t=3, period=2),
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


# Every rule.


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


# Plain averaging, and FedEx-LoRA, which folds what it loses.


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


# Ranks that differ: FLoRA, FlexLoRA, HetLoRA.

WIDE = {"base_model.model.layer.0": (24, 20), "base_model.model.layer.1": (18, 33)}


@given(seed=SEEDS)
@FEW
def test_flora_loses_nothing_of_mixed_ranks(seed):
    found = case(seed, ranks=[4, 8, 16], sizes=WIDE)
    result = Scene(stack_fold).run(found)
    for path in WIDE:
        assert_near(got(result, path), wanted(found, path))
    assert all(result.fold[a].shape[0] == 28 for a in AS)


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


# LoRA-FAIR.


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


# FedSVD and DEeR: other factors of the same product.


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


def spans(basis: np.ndarray, vectors: np.ndarray) -> bool:
    """Whether orthonormal columns span the given ones: nothing is left after projection."""
    basis, vectors = wide(basis), wide(vectors)
    return np.linalg.norm(vectors - basis @ (basis.T @ vectors)) <= 1e-6 * np.linalg.norm(vectors)


def resting(adapter: Adapter, t: int) -> list[np.ndarray]:
    """Columns of what rests in the round after t: of B after odd rounds, rows of A after even."""
    return [adapter[b] if t % 2 else adapter[a].T for b, a in PAIRS]


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


# Rules that start over: subspaces, RAC-LoRA, FLoRA.


@given(seed=SEEDS, t=st.integers(1, 8), clients=st.integers(1, 4))
@FEW
def test_the_next_projector_spans_the_mean_update_and_its_partner_is_zero(seed, t, clients):
    travelling = "B" if t % 2 else "A"
    found = case(seed, clients, travelling)
    result = Scene(subspace_fold, travelling, t=t).run(found)
    for path, columns, (b, a) in zip(SIZES, resting(result.adapter, t), PAIRS, strict=True):
        np.testing.assert_allclose(columns.T @ columns, np.eye(RANK), atol=1e-6)
        assert spans(columns, mean_of(found, b) if t % 2 else mean_of(found, a).T)
        assert not result.adapter[a if t % 2 else b].any()
        assert not product(result.adapter, path).any()
        assert_near(product(result.fold, path), wanted(found, path))


@pytest.mark.parametrize("t", [1, 2])
def test_a_zero_update_moves_nothing_and_still_leaves_a_projector(t):
    travelling = "B" if t % 2 else "A"
    found = case(0, 2, travelling)
    for client in found.clients:
        client |= {name: np.zeros_like(client[name]) for name in (BS if t % 2 else AS)}
    result = Scene(subspace_fold, travelling, t=t).run(found)
    for path, columns in zip(SIZES, resting(result.adapter, t), strict=True):
        assert not got(result, path).any()
        np.testing.assert_allclose(columns.T @ columns, np.eye(RANK), atol=1e-6)


@pytest.mark.parametrize(("t", "ends"), [(1, False), (2, True), (3, False), (4, True)])
def test_rac_folds_at_the_end_of_a_block_only(t, ends):
    found = case(0, travelling="B")
    result = Scene(chain_fold, "B", t=t, period=2).run(found)
    assert bool(result.fold) == ends
    for b, a in PAIRS:
        assert np.array_equal(result.adapter[a], found.current[a]) != ends
        assert result.adapter[b].any() != ends
        if not ends:
            assert_near(result.adapter[b], mean_of(found, b))


STARTING = {"RAC-LoRA": Scene(chain_fold, "B"), "FLoRA": Scene(stack_fold)}


def fresh(scene: Scene, found: Case, t: int = 1, seed: int = 7) -> Adapter:
    uploads = found.uploads(scene.travelling)
    adapter = scene.rule(found.current, found.weights, uploads, at(t, seed)).adapter
    assert not any(adapter[b].any() for b in BS)
    return {a: adapter[a] for a in AS}


def differ(first: Adapter, second: Adapter) -> bool:
    return not any(np.any(first[name] == second[name]) for name in first)


@pytest.mark.parametrize("scene", STARTING.values(), ids=STARTING)
def test_a_new_a_is_drawn_from_seed_and_round_and_from_no_upload(scene):
    found, other = case(0, 3, scene.travelling), case(1, 2, scene.travelling)
    first = fresh(scene, found)
    for same in (fresh(scene, found), fresh(scene, other)):
        assert all(first[a].tobytes() == same[a].tobytes() for a in AS)
    assert differ(first, fresh(scene, found, t=2))
    assert differ(first, fresh(scene, found, seed=8))
    assert differ(first, {a: found.current[a] for a in AS})


@pytest.mark.parametrize("scene", STARTING.values(), ids=STARTING)
def test_a_new_a_is_uniform_within_one_over_the_root_of_its_width(scene):
    layers = dict.fromkeys(SIZES, (4, 4000))
    drawn_a = fresh(scene, case(0, 2, scene.travelling, sizes=layers))
    for values in drawn_a.values():
        levels = np.sort(values.ravel()) * np.sqrt(4000)  # U(-1, 1)
        assert np.abs(levels).max() <= 1 + 1e-6
        uniform = np.linspace(-1, 1, levels.size)
        assert np.abs(levels - uniform).max() < 0.05  # Kolmogorov-Smirnov at 12,000 draws: 0.036
    assert differ(dict(x=drawn_a[AS[0]]), dict(x=drawn_a[AS[1]]))


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
