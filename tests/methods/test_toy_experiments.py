"""Small experiments of the papers, on least squares in float64 clients, with the app's own rules.

The loss of client k is ½‖W + B·A - W*_k‖², and the optimum of all is the mean of W*_k. Clients take
plain gradient steps on the factors that the method's schedule trains. No noise.
"""

import numpy as np
import pytest

from helpers.server_rules import at
from lalora_app.adapter.factors import select
from lalora_app.aggregation.fold_into_base import random_a
from lalora_app.methods.table import METHODS

B, A = "base_model.model.layer.lora_B.weight", "base_model.model.layer.lora_A.weight"
M, N, RANK, CLIENTS = 12, 10, 2, 4


def targets(rank: int, spread: float, seed: int = 0) -> list[np.ndarray]:
    """W*_k of each client; their mean has the given rank, and they differ by ``spread``."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((M, rank)) @ rng.standard_normal((rank, N))
    offsets = rng.standard_normal((CLIENTS, M, N)) * spread
    return list(mean + offsets - offsets.mean(0))


def start(seed: int = 0) -> dict[str, np.ndarray]:
    return {A: random_a((RANK, N), at(seed=seed), A), B: np.zeros((M, RANK), np.float32)}


def trained(method, base, adapter, wanted, t, steps):
    """Return a client's factors after local steps, each of half the rate 1/‖other factor‖²."""
    b, a = adapter[B].astype(np.float64), adapter[A].astype(np.float64)
    for k in range(steps):
        factors, error = method.trains(t, k), base + b @ a - wanted
        step_b = error @ a.T / max(np.linalg.norm(a, 2) ** 2, 1e-9)
        step_a = b.T @ error / max(np.linalg.norm(b, 2) ** 2, 1e-9)
        b = b - 0.5 * step_b if "B" in factors else b
        a = a - 0.5 * step_a if "A" in factors else a
    return {B: b.astype(np.float32), A: a.astype(np.float32)}


def errors(name: str, wanted, rounds: int, steps: int = 100) -> list[float]:
    """Return ‖W + B·A - mean W*‖/‖mean W*‖ after each round of a method."""
    method, optimum = METHODS[name], np.mean(wanted, 0)
    adapter = method.start(start(), at().numbers)
    base, found = np.zeros((M, N)), []
    for t in range(1, rounds + 1):
        ups = [trained(method, base, adapter, own, t, steps) for own in wanted]
        sent = [select(up, method.sent(t, last=False)) for up in ups]
        result = method.aggregate(adapter, [1.0] * CLIENTS, sent, at(t=t))
        adapter = {**adapter, **result.adapter}
        if result.fold:
            base = base + result.fold[B].astype(np.float64) @ result.fold[A].astype(np.float64)
        now = base + adapter[B].astype(np.float64) @ adapter[A].astype(np.float64)
        found.append(float(np.linalg.norm(now - optimum) / np.linalg.norm(optimum)))
    return found


def outside_of_rows(matrix: np.ndarray, a: np.ndarray) -> float:
    """Return the part of a matrix outside of the row space of A, relative to its norm."""
    inside = matrix @ np.linalg.pinv(a.astype(np.float64)) @ a.astype(np.float64)
    return float(np.linalg.norm(matrix - inside) / np.linalg.norm(matrix))


def test_ffa_ends_at_the_best_matrix_in_the_row_space_of_a():
    """arXiv:2403.12313: exact averaging, and no more than the rows of the frozen A can say."""
    wanted = targets(rank=RANK, spread=1.0)
    found = errors("ffa-lora", wanted, rounds=60)
    assert found[-1] == pytest.approx(outside_of_rows(np.mean(wanted, 0), start()[A]), rel=1e-3)
    assert found[-1] > 0.5


def test_rolora_reaches_an_optimum_of_its_rank_where_ffa_does_not():
    """arXiv:2502.01755, the analysis of a linear model: A is learnt as well."""
    wanted = targets(rank=RANK, spread=0.0)
    assert errors("rolora", wanted, rounds=60)[-1] < 1e-3
    assert errors("ffa-lora", wanted, rounds=60)[-1] > 0.5


def test_rac_reaches_an_optimum_of_full_rank_where_no_lora_of_its_rank_can():
    """arXiv:2410.08305: a chain of random subspaces converges in the whole space."""
    wanted = targets(rank=N, spread=1.0)
    singular = np.linalg.svd(np.mean(wanted, 0), compute_uv=False)
    best = np.sqrt(np.sum(singular[RANK:] ** 2) / np.sum(singular**2))
    assert best > 0.5  # the error of the best matrix of this rank
    assert errors("rac-lora", wanted, rounds=80)[-1] < 1e-3
    assert errors("rolora", wanted, rounds=80)[-1] > 0.9 * best


def test_the_mirrored_chain_reaches_it_too():
    """arXiv:2410.08305: random subspaces of the columns, in place of the rows."""
    wanted = targets(rank=N, spread=1.0)
    assert errors("rac-lora-a", wanted, rounds=80)[-1] < 1e-3


def test_a_block_of_rac_keeps_the_share_one_minus_r_over_n_of_the_squared_error():
    """arXiv:2410.08305: the mean projection on the rows of a random A is (r/n)·I."""
    wanted = targets(rank=N, spread=0.0)
    kept = []
    for seed in range(400):
        rows = random_a((RANK, N), at(seed=seed), A)
        kept.append(outside_of_rows(wanted[0], rows) ** 2)
    assert np.mean(kept) == pytest.approx(1 - RANK / N, abs=4 * np.std(kept) / np.sqrt(len(kept)))
    squared = np.square(errors("rac-lora", wanted, rounds=40))
    rate = (squared[-1] / squared[0]) ** (1 / (len(squared) - 1))
    assert rate == pytest.approx(1 - RANK / N, abs=0.06)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_what_stacking_and_folding_keep_is_lost_by_averaging(name):
    """arXiv:2409.05976, arXiv:2410.09432: a round is the exact mean of the clients' products."""
    wanted = targets(rank=N, spread=1.0)
    method, adapter, base = METHODS["dp-lora"], start(), np.zeros((M, N))
    ups = [trained(method, base, adapter, own, 1, 10) for own in wanted]
    mean = np.mean([up[B].astype(np.float64) @ up[A].astype(np.float64) for up in ups], 0)

    def server(rule):
        result = METHODS[rule].aggregate(adapter, [1.0] * CLIENTS, ups, at())
        sums = [result.adapter, result.fold] if result.fold else [result.adapter]
        return sum(part[B].astype(np.float64) @ part[A].astype(np.float64) for part in sums)

    assert np.linalg.norm(server(name) - mean) < 1e-5 * np.linalg.norm(mean)
    assert np.linalg.norm(server("dp-lora") - mean) > 1e-2 * np.linalg.norm(mean)


def test_lora_fair_trades_the_residual_against_the_distance_from_the_mean_of_b():
    """arXiv:2411.14961: without its weight the residual is smallest and B is farthest."""
    wanted = targets(rank=N, spread=1.0)
    ups = [trained(METHODS["dp-lora"], np.zeros((M, N)), start(), own, 1, 10) for own in wanted]
    mean_b = np.mean([up[B] for up in ups], 0, dtype=np.float64)
    mean_a = np.mean([up[A] for up in ups], 0, dtype=np.float64)
    mean = np.mean([up[B].astype(np.float64) @ up[A].astype(np.float64) for up in ups], 0)
    residual, distance = [], []
    for weight in (0.0, 0.01, 0.1, 1.0, np.inf):
        fixed = METHODS["lora-fair"].aggregate(
            start(), [1.0] * CLIENTS, ups, at(fair_weight=weight)
        )
        residual.append(np.linalg.norm(fixed.adapter[B] @ mean_a - mean))
        distance.append(np.linalg.norm(fixed.adapter[B] - mean_b))
    assert residual == sorted(residual)
    assert distance == sorted(distance, reverse=True)
    assert residual[0] < residual[-1]
    assert distance[0] > distance[-1] == pytest.approx(0, abs=1e-5)


def test_noise_in_both_factors_has_a_product_term_that_noise_in_one_has_not():
    """arXiv:2403.12313: E‖noise‖² is τ²(m‖A‖² + n‖B‖²) + mnr·τ⁴; of B alone τ²m‖A‖²."""
    rng, tau, draws = np.random.default_rng(0), 0.7, 4000
    b, a = rng.standard_normal((M, RANK)), rng.standard_normal((RANK, N))
    noise_b = tau * rng.standard_normal((draws, M, RANK))
    noise_a = tau * rng.standard_normal((draws, RANK, N))
    both = (b + noise_b) @ (a + noise_a) - b @ a
    alone = noise_b @ a
    size_a, size_b = np.sum(a**2), np.sum(b**2)
    linear = tau**2 * (M * size_a + N * size_b)
    assert np.sum(both**2) / draws == pytest.approx(linear + M * N * RANK * tau**4, rel=0.02)
    assert np.sum(alone**2) / draws == pytest.approx(tau**2 * M * size_a, rel=0.02)
