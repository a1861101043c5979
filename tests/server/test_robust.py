"""Median, trimmed mean and Krum against their definitions, and what one wild client can do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_config
from lalora_app.adapter.factors import Adapter
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.server.robust import COMBINE, krum, median, robust, trimmed_mean

SHAPES = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2), "classifier.bias": (3,)}
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=20, deadline=None, derandomize=True)


def drawn(seed: int, clients: int) -> list[Adapter]:
    rng = np.random.default_rng(seed)
    return [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert all(array.dtype == np.float32 for array in found.values())


def by_entry(uploads: list[Adapter], combine) -> Adapter:
    """Sort the clients' values of every entry, and combine the sorted list."""
    result = {}
    for name, shape in SHAPES.items():
        result[name] = np.empty(shape, np.float64)
        for place in np.ndindex(shape):
            result[name][place] = combine(sorted(float(up[name][place]) for up in uploads))
    return result


def middle(values: list[float]) -> float:
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def assert_near(found: Adapter, expected: Adapter) -> None:
    for name in SHAPES:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, clients=st.integers(1, 8))
@FEW
def test_the_median_is_the_middle_of_every_entry(seed, clients):
    uploads = drawn(seed, clients)
    assert_near(median(uploads, 0), by_entry(uploads, middle))


@given(seed=SEEDS, suspects=st.integers(0, 3), more=st.integers(1, 5))
@FEW
def test_the_trimmed_mean_is_without_the_lowest_and_highest_of_every_entry(seed, suspects, more):
    clients = 2 * suspects + more
    uploads = drawn(seed, clients)

    def trimmed(values: list[float]) -> float:
        kept = values[suspects : clients - suspects]
        return sum(kept) / len(kept)

    assert_near(trimmed_mean(uploads, suspects), by_entry(uploads, trimmed))


def test_the_number_of_trimmed_clients_is_never_rounded():
    for clients in range(1, 60):
        uploads = [{"x": np.full(1, float(2**i if i < 30 else 2**30 + i))} for i in range(clients)]
        values = [float(up["x"][0]) for up in uploads]
        for suspects in range((clients - 1) // 2 + 1):
            wanted = np.mean(values[suspects : clients - suspects])
            found = trimmed_mean(uploads, suspects)["x"][0]
            assert found == pytest.approx(wanted, rel=1e-6), (clients, suspects)


def test_with_one_client_more_than_twice_the_suspects_the_trimmed_mean_is_the_median():
    for suspects in range(4):
        uploads = drawn(suspects, 2 * suspects + 1)
        assert_same(trimmed_mean(uploads, suspects), median(uploads, 0))


def krum_loop(uploads: list[Adapter], suspects: int) -> int:
    """The client with the smallest sum of squared distances to its n − f − 2 nearest others."""
    scores = []
    for i, own in enumerate(uploads):
        distances = sorted(
            sum(float(np.sum((own[n].astype(np.float64) - other[n]) ** 2)) for n in SHAPES)
            for j, other in enumerate(uploads)
            if j != i
        )
        scores.append(sum(distances[: len(uploads) - suspects - 2]))
    return min(range(len(scores)), key=scores.__getitem__)


@given(
    seed=SEEDS,
    suspects=st.integers(0, 3),
    more=st.integers(0, 4),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@FEW
def test_krum_chooses_as_its_definition_does(seed, suspects, more, scale):
    uploads = [
        {name: array * np.float32(scale) for name, array in upload.items()}
        for upload in drawn(seed, 2 * suspects + 3 + more)
    ]
    assert krum(uploads, suspects) is uploads[krum_loop(uploads, suspects)]


def test_krum_counts_the_nearest_others_only():
    """Three of five sit together; the pair is nearer to each other, but far from a third."""
    places = [0.0, 1.0, 2.0, 50.0, 50.1]
    uploads = [{name: np.full(s, p, np.float32) for name, s in SHAPES.items()} for p in places]
    assert krum(uploads, 1) is uploads[1]
    found = krum(uploads, 2)  # now one neighbour is enough
    assert found is uploads[3] or found is uploads[4]


def wild(kind: str) -> Adapter:
    adapter = drawn(99, 1)[0]
    scale = {"huge": 1e30, "turned": -1e3, "constant": 0.0}[kind]
    shift = 7e5 if kind == "constant" else 0.0
    return {name: array * np.float32(scale) + np.float32(shift) for name, array in adapter.items()}


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("how", ["huge", "turned", "constant"])
@pytest.mark.parametrize("kind", COMBINE)
def test_one_wild_client_moves_no_robust_mean_out_of_the_honest_range(kind, how, place):
    honest = drawn(1, 6)
    uploads = [*honest[:place], wild(how), *honest[place:]]
    weights = [1e9 if i == place else 1.0 for i in range(7)]  # nor does its weight count
    shares, kept = robust(kind, 1, weights, uploads)
    assert shares == [1.0]
    (found,) = kept
    for name in SHAPES:
        stack = np.stack([upload[name] for upload in honest])
        assert (found[name] >= stack.min(0)).all()
        assert (found[name] <= stack.max(0)).all()
    if kind == "krum":
        assert any(found is upload for upload in honest)


@pytest.mark.parametrize("kind", COMBINE)
def test_where_clients_agree_a_robust_mean_is_what_they_say_and_the_rule_passes_it_on(kind):
    uploads = [drawn(2, 1)[0]] * 5
    current = drawn(3, 1)[0]
    shares, kept = robust(kind, 1, [1.0] * 5, uploads)
    info = RoundInfo(t=1, rounds=2, seed=0, numbers=make_config().rule)
    found = federated_averaging(current, shares, kept, info).adapter
    assert_same(found, kept[0])
    assert_near(found, uploads[0])


def test_without_a_robust_mean_weights_and_uploads_are_the_very_same():
    weights, uploads = [1.0, 2.0], drawn(0, 2)
    shares, kept = robust("none", 0, weights, uploads)
    assert shares is weights
    assert kept is uploads


@pytest.mark.parametrize("kind", COMBINE)
def test_what_a_robust_mean_is_given_stays_as_it_is(kind):
    uploads, before = drawn(4, 5), drawn(4, 5)
    robust(kind, 1, [1.0] * 5, uploads)
    for upload, kept in zip(uploads, before, strict=True):
        assert_same(upload, kept)
