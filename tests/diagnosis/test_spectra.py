"""Intruders, cosines and Lanczos, each against a dense and plainer route in float64."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.aggregation.measured_error import mean_cosine, update_cosines
from lalora_app.diagnosis.spectra import intruder_dimensions, lanczos_top, similarity

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def orthonormal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


# --- intruder dimensions -------------------------------------------------------------------------


def left_vectors(weight: np.ndarray) -> list[np.ndarray]:
    """Eigenvectors of W Wᵀ whose eigenvalue is not zero, the largest first."""
    sizes, vectors = np.linalg.eigh(weight @ weight.T)
    order = np.argsort(sizes)[::-1]
    return [vectors[:, i] for i in order if sizes[i] > 1e-12 * sizes.max()]


def intruders_by_loop(base, adapted, top: int, threshold: float) -> int:
    count = 0
    for vector in left_vectors(adapted)[:top]:
        count += all(abs(vector @ known) < threshold for known in left_vectors(base))
    return count


@dataclass
class Weights:
    """A base weight of any rank, and what a few strong directions make of it."""

    base: np.ndarray
    adapted: np.ndarray


@st.composite
def weights(draw) -> Weights:
    rng = np.random.default_rng(draw(seeds))
    outputs, inputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, min(outputs, inputs)))
    base = rng.standard_normal((outputs, rank)) @ rng.standard_normal((rank, inputs))
    directions = draw(st.integers(0, 3))
    update = rng.standard_normal((outputs, directions)) @ rng.standard_normal((directions, inputs))
    return Weights(base, base + draw(st.sampled_from([0.1, 1.0, 10.0])) * update)


@given(case=weights(), top=st.integers(1, 15), threshold=st.sampled_from([0.3, 0.5, 0.6, 1.0]))
@settings(quick, max_examples=150)
def test_intruders_are_counted_as_by_the_eigenvectors_of_the_gram_matrix(case, top, threshold):
    if threshold == 1.0:  # a cosine of exactly 1 is on either side of it
        threshold = 1 - 1e-9
    found = intruder_dimensions(case.base, case.adapted, top=top, threshold=threshold)
    assert found == intruders_by_loop(case.base, case.adapted, top, threshold)
    assert type(found) is int


def test_the_stronger_the_update_the_more_of_its_directions_intrude():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((30, 30))
    update = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 30))
    weak, middling, strong = (base + scale * update for scale in (0.03, 0.3, 30.0))
    assert intruder_dimensions(base, weak) == 0
    assert 0 < intruder_dimensions(base, middling) < 4
    assert intruder_dimensions(base, strong) == 4  # the rank of the update


@given(case=weights())
@quick
def test_identical_weights_have_no_intruder_and_size_and_sign_do_not_count(case):
    assert intruder_dimensions(case.base, case.base) == 0
    found = intruder_dimensions(case.base, case.adapted)
    assert intruder_dimensions(-case.base, 1e3 * case.adapted) == found
    assert intruder_dimensions(1e-3 * case.base, -case.adapted) == found


@given(case=weights(), seed=seeds)
@quick
def test_intruders_live_on_the_output_side_only(case, seed):
    turn = orthonormal(np.random.default_rng(seed), case.base.shape[1])
    found = intruder_dimensions(case.base, case.adapted)
    assert intruder_dimensions(case.base, case.adapted @ turn) == found


@given(case=weights())
@quick
def test_more_vectors_and_a_higher_threshold_find_no_fewer(case):
    by_top = [intruder_dimensions(case.base, case.adapted, top=top) for top in range(1, 14)]
    bounds = (0.1, 0.3, 0.5, 0.7, 0.9)
    by_threshold = [intruder_dimensions(case.base, case.adapted, threshold=t) for t in bounds]
    for counts in (by_top, by_threshold):
        assert counts == sorted(counts)
    assert by_top[-1] <= min(case.base.shape)


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("top", [1, 4, 6, 100])
def test_an_orthogonal_spike_is_exactly_one_intruder(rank, top):
    """Of a base that does not reach it: rank below min(m, n), and a tall one of full rank."""
    rng = np.random.default_rng(0)
    left, right = orthonormal(rng, 8), orthonormal(rng, 5)
    base = left[:, :rank] @ np.diag(np.arange(rank, 0, -1.0)) @ right[:, :rank].T
    spike = 100 * np.outer(left[:, rank], right[:, -1])
    assert intruder_dimensions(base, base + spike, top=top) == 1
    assert intruder_dimensions(base, base + 1e-3 * spike, top=rank - 1) == 0  # not a leading one


def test_a_mixture_of_all_vectors_of_a_square_base_is_an_intruder():
    """cos = 1/√16 with each of them: below 0.5, above 0.2."""
    left = orthonormal(np.random.default_rng(0), 16)
    base = left @ np.diag(np.arange(16, 0, -1.0))
    mixture = left.sum(axis=1) / 4
    adapted = base + 1e6 * np.outer(mixture, np.ones(16))
    assert intruder_dimensions(base, adapted, top=1) == 1
    assert intruder_dimensions(base, adapted, top=1, threshold=0.2) == 0


def test_everything_intrudes_on_a_base_of_zero_and_nothing_is_left_of_an_adapted_zero():
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    assert intruder_dimensions(np.zeros((4, 3)), weight) == 3
    assert intruder_dimensions(np.zeros((4, 3)), weight, top=2) == 2
    assert intruder_dimensions(weight, np.zeros((4, 3))) == 0
    assert intruder_dimensions(np.zeros((4, 0)), np.zeros((4, 0))) == 0
    assert intruder_dimensions(np.ones((1, 1)), -np.ones((1, 1))) == 0


@pytest.mark.parametrize(
    ("shapes", "options", "law"),
    [
        (((2, 3), (3, 2)), {}, "shapes (2, 3) and (3, 2) must be one (m, n)"),
        (((2,), (2,)), {}, "shapes (2,) and (2,) must be one (m, n)"),
        (((2, 2), (2, 2)), {"top": 0}, "top=0 must be at least 1"),
        (((2, 2), (2, 2)), {"threshold": 0.0}, "threshold=0.0 must be in (0, 1]"),
        (((2, 2), (2, 2)), {"threshold": 1.1}, "threshold=1.1 must be in (0, 1]"),
        (((2, 2), (2, 2)), {"threshold": math.nan}, "threshold=nan must be in (0, 1]"),
    ],
)
def test_what_intruders_cannot_be_counted_of(shapes, options, law):
    with pytest.raises(ValueError, match=re.escape(law)):
        intruder_dimensions(np.ones(shapes[0]), np.ones(shapes[1]), **options)


@quick
@given(seed=seeds, top=st.integers(1, 8))
def test_similarity_is_that_of_the_plain_loop(seed, top):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((7, 5))
    adapted = base + 0.3 * rng.standard_normal((7, 5))
    found = similarity(base, adapted, top=top)
    first, second = (left_vectors(weight)[:top] for weight in (base, adapted))
    expected = [[abs(u @ v) for v in second] for u in first]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_similarity_of_equal_weights_is_the_identity_and_a_new_direction_has_a_low_column():
    rng = np.random.default_rng(0)
    left, right = orthonormal(rng, 6), orthonormal(rng, 6)
    base = left[:, :4] * [4.0, 3.0, 2.0, 1.0] @ right[:, :4].T
    np.testing.assert_allclose(similarity(base, base, top=4), np.eye(4), atol=1e-9)
    added = base + 9.0 * np.outer(left[:, 5], right[:, 5])
    found = similarity(base, added, top=4)
    assert found[:, 0].max() < 1e-9
    np.testing.assert_allclose(found[:, 1:], np.eye(4)[:, :3], atol=1e-9)


def test_similarity_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"must be one \(m, n\)"):
        similarity(np.ones((2, 3)), np.ones((3, 2)), top=1)
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        similarity(np.ones((2, 2)), np.ones((2, 2)), top=0)


# --- cosines -------------------------------------------------------------------------------------

Update = dict[str, np.ndarray]
SHAPES = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2), "classifier.bias": (3,)}


def update_of(rng: np.random.Generator, scale: float) -> Update:
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


@st.composite
def updates(draw) -> list[Update]:
    """Of one to five clients; sizes from tiny to huge, and exactly zero."""
    rng = np.random.default_rng(draw(seeds))
    scales = draw(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e30]), min_size=1, max_size=5))
    return [update_of(rng, scale) for scale in scales]


def flat(update: Update) -> list[float]:
    return [float(entry) for name in sorted(update) for entry in update[name].ravel()]


def cosine_of(first: Update, second: Update) -> float:
    """Entry by entry, with exact sums; 0 where one of them has no direction."""
    u, v = flat(first), flat(second)
    lengths = [math.sqrt(math.fsum(x * x for x in w)) for w in (u, v)]
    dot = math.fsum(x * y for x, y in zip(u, v, strict=True))
    return dot / (lengths[0] * lengths[1]) if all(lengths) else 0.0


@given(case=updates())
@quick
def test_cosines_are_those_of_the_flattened_updates(case):
    found, clients = update_cosines(case), range(len(case))
    expected = [[1.0 if i == j else cosine_of(case[i], case[j]) for j in clients] for i in clients]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.array_equal(found, found.T)
    assert np.abs(found).max() <= 1
    assert found.dtype == np.float64


@given(case=updates())
@quick
def test_the_mean_is_over_the_pairs_of_different_clients(case):
    pairs = [cosine_of(u, v) for i, u in enumerate(case) for v in case[:i]]
    found = mean_cosine(case)
    assert (found is None) == (len(case) == 1)
    assert found is None or found == pytest.approx(math.fsum(pairs) / len(pairs), abs=1e-12)


@given(case=updates(), factor=st.sampled_from([0.5, 2.0, -4.0]))
@quick
def test_a_scaled_or_turned_update_moves_its_own_signs_only(case, factor):
    scaled = {name: np.float64(factor) * array for name, array in case[0].items()}
    signs = np.outer(*[[np.sign(factor)] + [1.0] * (len(case) - 1)] * 2)
    found = update_cosines([scaled, *case[1:]])
    np.testing.assert_allclose(found, signs * update_cosines(case), rtol=0, atol=1e-12)


def test_the_order_of_the_tensors_does_not_count():
    rng = np.random.default_rng(0)
    one, two = update_of(rng, 1), update_of(rng, 1)
    turned = dict(reversed(two.items()))
    assert np.array_equal(update_cosines([one, two]), update_cosines([one, turned]))


def test_cosines_at_their_ends():
    one = update_of(np.random.default_rng(0), 1)
    opposite = {name: -array for name, array in one.items()}
    zero = {name: np.zeros_like(array) for name, array in one.items()}
    np.testing.assert_allclose(
        update_cosines([one, one, opposite, zero, zero]),
        [[1, 1, -1, 0, 0], [1, 1, -1, 0, 0], [-1, -1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
        rtol=1e-15,
    )
    assert mean_cosine([one, one]) == pytest.approx(1)
    assert mean_cosine([zero, zero]) == 0.0
    assert mean_cosine([one]) is None
    assert np.array_equal(update_cosines([zero]), [[1.0]])


def test_rounding_makes_no_cosine_larger_than_one():
    rng = np.random.default_rng(0)
    for update in (update_of(rng, 1) for _ in range(50)):
        tripled = {name: 3 * array.astype(np.float64) for name, array in update.items()}
        found = update_cosines([update, tripled])[0, 1]
        assert 1 - 1e-15 <= found <= 1


@pytest.mark.parametrize("function", [update_cosines, mean_cosine])
def test_updates_that_do_not_fit_each_other_are_refused(function):
    one = update_of(np.random.default_rng(0), 1)
    fewer = {name: array for name, array in one.items() if "bias" not in name}
    longer = one | {"classifier.bias": np.zeros(4)}
    with pytest.raises(ValueError, match="0 updates: there must be at least 1"):
        function([])
    with pytest.raises(ValueError, match=r"update 2 must have .* update 0: classifier\.bias"):
        function([one, one, fewer])
    with pytest.raises(ValueError, match=r"classifier\.bias of \[\(3,\), \(4,\)\] must be"):
        function([one, longer])


# --- Lanczos -------------------------------------------------------------------------------------


def symmetric(rng: np.random.Generator, spectrum) -> np.ndarray:
    turn = orthonormal(rng, len(spectrum))
    matrix = turn @ np.diag(np.asarray(spectrum, dtype=np.float64)) @ turn.T
    return (matrix + matrix.T) / 2


@dataclass
class Watched:
    """A dense matrix that keeps what it was multiplied with."""

    matrix: np.ndarray

    def __post_init__(self):
        self.vectors: list[np.ndarray] = []

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        self.vectors.append(vector.copy())
        return self.matrix @ vector


def top_of(matrix: np.ndarray, steps: int, seed: int = 0) -> float:
    found = lanczos_top(
        lambda v: matrix @ v, len(matrix), steps=steps, rng=np.random.default_rng(seed)
    )
    assert type(found) is float
    return found


spectra = st.lists(st.integers(-9, 9), min_size=1, max_size=12)  # equal ones, zeros, all negative


@given(spectrum=spectra, extra=st.integers(0, 3), scale=st.sampled_from([1e-20, 1, 1e20]), s=seeds)
@settings(quick, max_examples=100)
def test_with_as_many_steps_as_entries_it_is_the_dense_eigenvalue(spectrum, extra, scale, s):
    matrix = scale * symmetric(np.random.default_rng(s), spectrum)
    found = top_of(matrix, len(spectrum) + extra, seed=s + 1)
    expected = np.linalg.eigvalsh(matrix)[-1]
    assert found == pytest.approx(expected, rel=0, abs=1e-11 * scale * 9)


@given(size=st.integers(1, 30), s=seeds)
@quick
def test_it_grows_with_the_steps_and_stays_below(size, s):
    matrix = symmetric(np.random.default_rng(s), np.random.default_rng(s).normal(size=size))
    found = [top_of(matrix, steps) for steps in range(1, size + 1)]
    rounding = 1e-12 * np.abs(matrix).max() * size
    assert all(after >= before - rounding for before, after in pairwise(found))
    assert found[-1] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], abs=10 * rounding)
    start = np.random.default_rng(0).standard_normal(size)
    assert found[0] == pytest.approx(start @ matrix @ start / (start @ start), abs=rounding)


def test_a_few_steps_find_an_eigenvalue_that_stands_out():
    matrix = symmetric(np.random.default_rng(0), [50.0, *np.linspace(-20, 20, 299)])
    assert top_of(matrix, 20) == pytest.approx(50, rel=1e-6)
    assert top_of(matrix, 3) < 49


def test_the_largest_is_not_the_largest_in_size():
    matrix = symmetric(np.random.default_rng(0), [-100.0, 1.0, 2.0, -3.0])
    assert top_of(matrix, 4) == pytest.approx(2)


@pytest.mark.parametrize(
    ("spectrum", "products"),
    [([5.0] * 30, 1), ([0.0] * 30, 1), ([3.0] + [0.0] * 29, 2), ([1.0, 2.0, 4.0] * 10, 3)],
)
def test_it_stops_where_the_krylov_space_closes(spectrum, products):
    watched = Watched(symmetric(np.random.default_rng(0), spectrum))
    found = lanczos_top(watched, 30, steps=30, rng=np.random.default_rng(1))
    assert len(watched.vectors) == products
    assert found == pytest.approx(max(spectrum), abs=1e-12)


def test_it_makes_no_more_products_than_steps_or_entries():
    matrix = symmetric(np.random.default_rng(0), np.arange(12.0))
    for steps, products in ((1, 1), (5, 5), (12, 12), (40, 12)):
        watched = Watched(matrix)
        lanczos_top(watched, 12, steps=steps, rng=np.random.default_rng(1))
        assert len(watched.vectors) == products


def test_its_vectors_stay_orthonormal_where_plain_lanczos_loses_them():
    """Eigenvalues that converge early make the three-term recurrence find them anew."""
    spectrum = np.concatenate([10.0 ** np.arange(4, 10), np.linspace(0, 1, 54)])
    watched = Watched(symmetric(np.random.default_rng(0), spectrum))
    lanczos_top(watched, 60, steps=50, rng=np.random.default_rng(1))
    vectors = np.array(watched.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), rtol=0, atol=1e-13)


def test_one_entry_is_its_own_eigenvalue():
    assert top_of(np.array([[-2.5]]), 20) == pytest.approx(-2.5)


def test_what_lanczos_refuses():
    rng = np.random.default_rng(0)
    for size, steps in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"size={size} and steps={steps} must be at least 1"):
            lanczos_top(lambda v: v, size, steps=steps, rng=rng)
    with pytest.raises(ValueError, match="2 entries that are not finite"):
        lanczos_top(lambda v: v * np.array([1, np.nan, np.inf]), 3, steps=2, rng=rng)
