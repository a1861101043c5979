"""Norm, SVD and compression of products B·A, compared with dense float64 matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.adapter.low_rank import (
    Product,
    add_to_drift,
    balanced_factors,
    compressed_factors,
    frobenius_norm,
    singular_values,
    sum_of_products,
    svd,
)

B, A = "base_model.model.layer.0.lora_B.weight", "base_model.model.layer.0.lora_A.weight"
FEW = settings(max_examples=40, deadline=None, derandomize=True)
Terms = list[tuple[float, np.ndarray, np.ndarray]]


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@st.composite
def sums(draw) -> Terms:
    """Draw terms (c, B, A) of one shape; the sum of ranks is below, at or above min(m, n)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return [(float(rng.normal()), drawn(rng, m, r), drawn(rng, r, n)) for r in ranks]


def dense(terms: Terms) -> np.ndarray:
    return sum(c * (b.astype(np.float64) @ a.astype(np.float64)) for c, b, a in terms)


def matmul(factors) -> np.ndarray:
    left, right = factors
    return left.astype(np.float64) @ right.astype(np.float64)


def tail(matrix: np.ndarray, rank: int) -> float:
    """The error of the best approximation of a rank (Eckart-Young), by numpy's dense SVD."""
    return float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:]))


def known(rng: np.random.Generator, m: int, n: int, singular: list[float]):
    """Return the SVD (u, s, vt) of a matrix, from QR factorisations of random matrices."""
    u = np.linalg.qr(rng.standard_normal((m, len(singular))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(singular))))[0]
    return u, np.array(singular), v.T


@given(terms=sums())
@FEW
def test_sum_of_products_equals_the_dense_sum_and_adds_ranks(terms):
    product = sum_of_products(terms)
    assert product.left.shape[1] == product.right.shape[0] == sum(b.shape[1] for _, b, _ in terms)
    assert product.left.dtype == product.right.dtype == np.float64
    np.testing.assert_allclose(matmul(product), dense(terms), atol=1e-12)


@given(terms=sums())
@FEW
def test_the_svd_reconstructs_the_sum_with_orthonormal_vectors(terms):
    whole, found = dense(terms), svd(sum_of_products(terms))
    kept = len(found.s)
    assert kept == min(*whole.shape, sum(b.shape[1] for _, b, _ in terms))
    np.testing.assert_allclose(found.u * found.s @ found.vt, whole, atol=1e-12)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(kept), atol=1e-12)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(kept), atol=1e-12)
    expected = np.linalg.svd(whole, compute_uv=False)
    np.testing.assert_allclose(found.s, expected[:kept], atol=1e-12)
    np.testing.assert_allclose(expected[kept:], 0, atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), mix=st.sampled_from(["none", "signs", "rotation", "wide"]))
@FEW
def test_the_svd_depends_on_the_product_only_including_signs(seed, mix):
    rng = np.random.default_rng(seed)
    u, s, vt = known(rng, 9, 8, [4.0, 2.0, 1.0])
    turn = {
        "none": np.eye(3),
        "signs": np.diag([-1.0, 1.0, -1.0]),
        "rotation": np.linalg.qr(rng.standard_normal((3, 3)))[0],
        "wide": np.linalg.qr(rng.standard_normal((8, 3)))[
            0
        ].T,  # R = min(m, n): the matrix is decomposed without QR of its sides
    }[mix]
    found = svd(Product(u * s @ turn, turn.T @ vt))
    for j in range(3):
        sign = 1 if u[np.argmax(np.abs(u[:, j])), j] > 0 else -1
        np.testing.assert_allclose(found.u[:, j], sign * u[:, j], atol=1e-12)
        np.testing.assert_allclose(found.vt[j], sign * vt[j], atol=1e-12)
    np.testing.assert_allclose(found.s, [4, 2, 1] + [0] * (len(found.s) - 3), atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 4))
@FEW
def test_the_svd_is_equal_for_ranks_at_and_above_the_smaller_side(seed, rank):
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((7, rank)), rng.standard_normal((rank, 5))
    narrow = svd(Product(left, right))
    for extra in (5 - rank, 6 - rank, 9):  # the rank of a zero product
        wide = Product(np.pad(left, ((0, 0), (0, extra))), np.pad(right, ((0, extra), (0, 0))))
        found = svd(wide)
        np.testing.assert_allclose(found.s[:rank], narrow.s, atol=1e-12)
        np.testing.assert_allclose(found.s[rank:], 0, atol=1e-12)
        np.testing.assert_allclose(found.u[:, :rank], narrow.u, atol=1e-9)
        np.testing.assert_allclose(found.vt[:rank], narrow.vt, atol=1e-9)


@given(terms=sums())
@FEW
def test_the_norm_equals_numpys_norm_of_the_dense_sum(terms):
    found = frobenius_norm(sum_of_products(terms))
    assert found == pytest.approx(np.linalg.norm(dense(terms)), rel=1e-11)


@given(terms=sums())
@FEW
def test_the_singular_values_are_those_of_the_svd(terms):
    product = sum_of_products(terms)
    expected = svd(product).s
    np.testing.assert_allclose(singular_values(product), expected, atol=1e-12 * expected[0])


@given(seed=st.integers(0, 2**32 - 1), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)))
@FEW
def test_the_norm_is_accurate_where_the_terms_cancel(seed, ranks):
    """A norm from Gram matrices would be accurate to 1e-8 of the terms only."""
    rng = np.random.default_rng(seed)
    large = drawn(rng, 20, ranks[0]), drawn(rng, ranks[0], 30)
    small = drawn(rng, 20, ranks[1]), drawn(rng, ranks[1], 30)
    left = frobenius_norm(sum_of_products([(1.0, *large), (1e-10, *small), (-1.0, *large)]))
    assert left == pytest.approx(1e-10 * np.linalg.norm(matmul(small)), rel=1e-4)
    gone = frobenius_norm(sum_of_products([(1.0, *large), (-1.0, *large)]))
    assert gone <= 1e-14 * np.linalg.norm(matmul(large))


@given(terms=sums(), rank=st.integers(1, 14))
@FEW
def test_balanced_factors_are_the_best_of_their_rank_and_have_equal_norms(terms, rank):
    whole = dense(terms)
    b, a = balanced_factors(svd(sum_of_products(terms)), rank)
    assert (b.shape, a.shape) == ((len(whole), rank), (rank, whole.shape[1]))
    assert b.dtype == a.dtype == np.float32
    size = np.linalg.norm(whole)
    assert np.linalg.norm(whole - matmul((b, a))) == pytest.approx(
        tail(whole, rank), abs=1e-6 * size
    )
    halves = np.sqrt(np.linalg.svd(whole, compute_uv=False))[:rank]
    for norms in (np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1)):
        np.testing.assert_allclose(norms[: len(halves)], halves, atol=1e-6 * np.sqrt(size))
        np.testing.assert_array_equal(norms[len(halves) :], 0)


@given(terms=sums(), rank=st.integers(2, 14), less=st.integers(1, 13))
@FEW
def test_balanced_factors_of_a_smaller_rank_are_the_first_columns(terms, rank, less):
    found, kept = svd(sum_of_products(terms)), min(less, rank)
    b, a = balanced_factors(found, rank)
    narrow_b, narrow_a = balanced_factors(found, kept)
    np.testing.assert_array_equal(b[:, :kept], narrow_b)
    np.testing.assert_array_equal(a[:kept], narrow_a)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 9)),
    inner=st.integers(1, 9),
)
@FEW
def test_compression_keeps_the_product_and_returns_its_rank(seed, shape, inner):
    """Factors of small integers, whose products are exact in float32, so the rank is known."""
    rng, (m, r, n) = np.random.default_rng(seed), shape
    b = (rng.integers(-3, 4, (m, inner)) @ rng.integers(-3, 4, (inner, r))).astype(np.float32)
    a = rng.integers(-3, 4, (r, n)).astype(np.float32)
    whole = matmul((b, a))
    small = compressed_factors(b, a)
    assert small[0].shape[1] == small[1].shape[0] == max(np.linalg.matrix_rank(whole), 1)
    assert np.linalg.norm(matmul(small) - whole) <= 1e-6 * np.linalg.norm(whole)
    assert small[0].dtype == small[1].dtype == np.float32


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_zero_product_has_zero_norm_zero_factors_and_one_column(rank):
    b, a = np.zeros((5, rank), np.float32), drawn(np.random.default_rng(0), rank, 4)
    product = sum_of_products([(1.0, b, a)])
    assert frobenius_norm(product) == 0
    np.testing.assert_array_equal(svd(product).s, 0)
    for factor, shape in zip(compressed_factors(b, a), [(5, 1), (1, 4)], strict=True):
        np.testing.assert_array_equal(factor, np.zeros(shape))
    for factor, shape in zip(balanced_factors(svd(product), 3), [(5, 3), (3, 4)], strict=True):
        np.testing.assert_array_equal(factor, np.zeros(shape))


@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    scale=st.sampled_from([0.25, 1.0, 3.0]),
)
@FEW
def test_the_drift_is_the_scaled_sum_of_all_folds_with_bounded_rank(seed, ranks, scale):
    rng = np.random.default_rng(seed)
    folds = [{B: drawn(rng, 8, r), A: drawn(rng, r, 6)} for r in ranks]
    before = [{name: array.tobytes() for name, array in fold.items()} for fold in folds]
    drift: dict[str, np.ndarray] = {}
    for fold in folds:
        drift = add_to_drift(drift, fold, scale)
    expected = scale * sum(matmul((fold[B], fold[A])) for fold in folds)
    np.testing.assert_allclose(
        matmul((drift[B], drift[A])), expected, atol=3e-6 * np.linalg.norm(expected)
    )
    assert drift[B].shape[1] == drift[A].shape[0] <= 6
    assert drift[B].dtype == drift[A].dtype == np.float32
    assert before == [{name: array.tobytes() for name, array in fold.items()} for fold in folds]


def test_layers_without_a_fold_keep_their_drift():
    rng = np.random.default_rng(0)
    drift = {B: drawn(rng, 8, 2), A: drawn(rng, 2, 6)}
    other = {name.replace("layer.0", "layer.1"): array for name, array in drift.items()}
    both = add_to_drift(drift, other, 2.0)
    assert set(both) == {*drift, *other}
    assert all(both[name] is drift[name] for name in drift)
