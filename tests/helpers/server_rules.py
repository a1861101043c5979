"""Uploads of made-up clients, server rules run on them, and dense float64 products."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from conftest import make_config
from lalora_app.adapter.factors import Adapter, select
from lalora_app.aggregation.rule import Aggregated, RoundInfo

HEAD = "base_model.model.classifier.weight"
SIZES = {"base_model.model.layer.0": (6, 9), "base_model.model.layer.1": (11, 8)}
RANK = 3
PAIRS = [(f"{path}.lora_B.weight", f"{path}.lora_A.weight") for path in SIZES]
BS, AS = [b for b, _ in PAIRS], [a for _, a in PAIRS]
FEW = settings(max_examples=12, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)


@cache
def numbers(**changes):
    return make_config(**{f"rule.{key.replace('_', '-')}": v for key, v in changes.items()}).rule


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


WIDE = {"base_model.model.layer.0": (24, 20), "base_model.model.layer.1": (18, 33)}


def spans(basis: np.ndarray, vectors: np.ndarray) -> bool:
    """Whether orthonormal columns span the given ones: nothing is left after projection."""
    basis, vectors = wide(basis), wide(vectors)
    return np.linalg.norm(vectors - basis @ (basis.T @ vectors)) <= 1e-6 * np.linalg.norm(vectors)


def resting(adapter: Adapter, t: int) -> list[np.ndarray]:
    """Columns of what rests in the round after t: of B after odd rounds, rows of A after even."""
    return [adapter[b] if t % 2 else adapter[a].T for b, a in PAIRS]


def fresh(scene: Scene, found: Case, t: int = 1, seed: int = 7) -> Adapter:
    uploads = found.uploads(scene.travelling)
    adapter = scene.rule(found.current, found.weights, uploads, at(t, seed)).adapter
    assert not any(adapter[b].any() for b in BS)
    return {a: adapter[a] for a in AS}


def differ(first: Adapter, second: Adapter) -> bool:
    return not any(np.any(first[name] == second[name]) for name in first)
