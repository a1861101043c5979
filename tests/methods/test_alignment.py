"""FedRot-LoRA's rotation keeps the product, undoes rotations, and is the nearest to the start."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.adapter.factors import Adapter
from lalora_app.methods.alignment import keep_result, rotate_to_start

B, A, HEAD = "q.lora_B.weight", "q.lora_A.weight", "classifier.weight"
M, N = 6, 9
SEEDS = st.integers(0, 2**32 - 1)
RANKS = st.integers(1, 4)
FEW = settings(max_examples=20, deadline=None, derandomize=True)


def drawn(rng: np.random.Generator, rank: int) -> Adapter:
    shapes = {B: (M, rank), A: (rank, N), HEAD: (2, 5)}
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def orthogonal(rng: np.random.Generator, rank: int) -> np.ndarray:
    """Return a random orthogonal matrix, with determinant 1 or −1."""
    q, r = np.linalg.qr(rng.standard_normal((rank, rank)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def wide(adapter: Adapter, name: str) -> np.ndarray:
    return adapter[name].astype(np.float64)


def product(adapter: Adapter) -> np.ndarray:
    return wide(adapter, B) @ wide(adapter, A)


def case(seed: int, rank: int) -> tuple[np.random.Generator, Adapter, Adapter]:
    rng = np.random.default_rng(seed)
    return rng, drawn(rng, rank), drawn(rng, rank)


@given(seed=SEEDS, rank=RANKS)
@FEW
def test_the_rotation_keeps_product_and_head_in_float32(seed, rank):
    _, start, result = case(seed, rank)
    before = {name: array.copy() for name, array in result.items()}
    found = rotate_to_start(start, result)
    np.testing.assert_allclose(product(found), product(result), atol=1e-5)
    assert found[HEAD] is result[HEAD]
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape, x.dtype) for n, x in result.items()
    }
    assert all(np.array_equal(result[name], array) for name, array in before.items())


@given(seed=SEEDS, rank=RANKS)
@FEW
def test_a_rotation_by_any_orthogonal_matrix_is_undone(seed, rank):
    rng, start, result = case(seed, rank)
    q = orthogonal(rng, rank)
    turned = result | {
        B: (wide(result, B) @ q).astype(np.float32),
        A: (q.T @ wide(result, A)).astype(np.float32),
    }
    assert rank == 1 or np.abs(turned[A] - result[A]).max() > 1e-3
    one, other = rotate_to_start(start, result), rotate_to_start(start, turned)
    # The smaller the smallest singular value of the overlap, the less accurate is the rotation.
    overlap = np.linalg.svd(wide(result, A) @ wide(start, A).T, compute_uv=False)
    tolerance = 1e-5 * (1 + overlap[0] / overlap[-1])
    for name in (B, A):
        np.testing.assert_allclose(other[name], one[name], atol=tolerance)


@given(seed=SEEDS, rank=RANKS)
@FEW
def test_no_orthogonal_matrix_reduces_the_distance_to_the_start(seed, rank):
    rng, start, result = case(seed, rank)
    reference, own = wide(start, A), wide(result, A)
    found = np.linalg.norm(wide(rotate_to_start(start, result), A) - reference)
    rest = [np.linalg.norm(orthogonal(rng, rank).T @ own - reference) for _ in range(200)]
    assert found <= min(rest) + 1e-5
    assert found <= np.linalg.norm(own - reference) + 1e-5
    # A small further rotation does not reduce the distance: it is at least a local minimum.
    here = wide(rotate_to_start(start, result), A)
    for _ in range(20):
        skew = rng.standard_normal((rank, rank))
        turn = np.linalg.qr(np.eye(rank) + 1e-2 * (skew - skew.T))[0]
        turn *= np.sign(np.diag(turn))
        assert found <= np.linalg.norm(turn.T @ here - reference) + 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_at_rank_one_the_rotation_is_a_sign(sign):
    _, start, result = case(0, 1)
    result[A] = (sign * start[A] + 0.1 * result[A]).astype(np.float32)
    found = rotate_to_start(start, result)
    for name in (A, B):
        np.testing.assert_allclose(found[name], sign * result[name], rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_unchanged_a_is_not_rotated(rank):
    _, start, result = case(1, rank)
    result[A] = start[A]
    found = rotate_to_start(start, result)
    for name in (A, B):
        np.testing.assert_allclose(found[name], result[name], atol=1e-5)


def test_the_mean_of_aligned_copies_of_one_product_is_that_product():
    rng, start, result = case(2, 3)
    clients = []
    for _ in range(4):
        q = orthogonal(rng, 3)
        turned = {B: wide(result, B) @ q, A: q.T @ wide(result, A)}
        clients.append(result | {name: x.astype(np.float32) for name, x in turned.items()})

    def of_means(adapters: list[Adapter]) -> np.ndarray:
        b, a = (np.mean([wide(one, name) for one in adapters], axis=0) for name in (B, A))
        return b @ a

    aligned = [rotate_to_start(start, client) for client in clients]
    np.testing.assert_allclose(of_means(aligned), product(result), atol=1e-4)
    assert np.linalg.norm(of_means(clients) - product(result)) > 1


def test_a_zero_factor_is_accepted():
    _, start, result = case(3, 3)
    result[A] = np.zeros_like(result[A])
    found = rotate_to_start(start, result)
    assert all(np.isfinite(array).all() for array in found.values())
    assert not product(found).any()


def test_keep_returns_the_result_itself():
    _, start, result = case(4, 2)
    assert keep_result(start, result) is result
