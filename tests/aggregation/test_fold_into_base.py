"""Test rules that move the mean product into the base: subspaces, RAC-LoRA, FLoRA."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.server_rules import (
    AS,
    BS,
    FEW,
    PAIRS,
    RANK,
    SEEDS,
    SIZES,
    WIDE,
    Scene,
    assert_near,
    case,
    differ,
    fresh,
    got,
    mean_of,
    product,
    resting,
    spans,
    wanted,
)
from lalora_app.aggregation.fold_into_base import (
    chain_fold,
    mirrored_chain_fold,
    stack_fold,
    start_with_random_b,
    subspace_fold,
)


@given(seed=SEEDS)
@FEW
def test_flora_loses_nothing_of_mixed_ranks(seed):
    found = case(seed, ranks=[4, 8, 16], sizes=WIDE)
    result = Scene(stack_fold).run(found)
    for path in WIDE:
        assert_near(got(result, path), wanted(found, path))
    assert all(result.fold[a].shape[0] == 28 for a in AS)


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


def turned(adapter):
    """The transposed problem: A of a layer is Bᵀ, and B is Aᵀ."""
    pairs = {name: other for b, a in PAIRS for name, other in ((b, a), (a, b))}
    return {pairs.get(name, name): array.T for name, array in adapter.items()}


@given(seed=SEEDS, t=st.integers(1, 4))
@FEW
def test_the_mirrored_chain_is_the_chain_of_the_transposed_problem(seed, t):
    """All but the draw of the new factor, which has its own name in the generator."""
    found = case(seed, travelling="A")
    mirrored = Scene(mirrored_chain_fold, "A", t=t, period=2).run(found)
    other = case(seed, travelling="A")
    other.current, other.clients = turned(other.current), [turned(c) for c in other.clients]
    chain = Scene(chain_fold, "B", t=t, period=2).run(other)
    assert {*mirrored.fold} == {*chain.fold}
    for name, array in turned(mirrored.fold).items():
        assert_near(chain.fold[name], array)
    for name, array in turned(mirrored.adapter).items():
        if t % 2 or name not in AS:
            assert_near(chain.adapter[name], array)


def test_the_mirrored_chain_draws_b_from_seed_and_round_and_a_starts_at_zero():
    found, scene = case(0, travelling="A"), Scene(mirrored_chain_fold, "A")
    first, again = scene.run(found), scene.run(case(1, 2, "A"))
    later = Scene(mirrored_chain_fold, "A", t=2).run(found)
    for b, a in PAIRS:
        assert first.adapter[b].tobytes() == again.adapter[b].tobytes()
        assert not np.any(first.adapter[b] == later.adapter[b])
        assert not first.adapter[a].any()
        assert np.abs(first.adapter[b]).max() <= len(first.adapter[b]) ** -0.5
    assert not np.any(first.adapter[BS[0]][:6] == first.adapter[BS[1]][:6])


def test_the_mirrored_chain_begins_with_a_random_b_of_the_runs_seed():
    layers = dict.fromkeys(SIZES, (4000, 5))
    starts = [case(seed, 1, sizes=layers).current for seed in (0, 1)]
    one, other = (start_with_random_b(start, None) for start in starts)
    assert start_with_random_b(starts[0], None)[BS[0]].tobytes() == one[BS[0]].tobytes()
    for b, a in PAIRS:
        assert one[b].shape == (4000, RANK)
        assert not one[a].any()
        assert not np.any(one[b] == other[b])
        levels = np.sort(one[b].ravel()) * np.sqrt(4000)  # U(-1, 1)
        assert np.abs(levels - np.linspace(-1, 1, levels.size)).max() < 0.05
    assert not np.any(one[BS[0]] == one[BS[1]])
