"""The average of the rounds' adapters, compared with means of dense products in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_config
from helpers.server_rules import (
    FEW,
    HEAD,
    PAIRS,
    RANK,
    SEEDS,
    SIZES,
    WIDE,
    assert_near,
    drawn,
    product,
    tail,
    wide,
)
from lalora_app.adapter.factors import AB
from lalora_app.server_state.iterate_average import final_adapter, with_average
from lalora_app.server_state.state import ServerState


def settings_of(average: str):
    return make_config(**{"server.average": average}).server


def walk(seed, rounds, sizes=SIZES, rank=RANK, resting=""):
    """Adapters of a random walk; factors of the kind ``resting`` stay the same."""
    rng = np.random.default_rng(seed)
    found = [drawn(rng, rank, sizes)]
    for _ in range(rounds - 1):
        step = drawn(rng, rank, sizes)
        moved = {n: x + np.float32(0.3) * step[n] for n, x in found[-1].items()}
        still = {n: x for n, x in found[-1].items() if resting and f"lora_{resting}" in n}
        found.append(moved | still)
    return found


def averaged(average, outcomes):
    """The states after each attempt; None is a failed one."""
    settings, state, found = settings_of(average), ServerState({}), []
    for adapter in outcomes:
        if adapter is None:
            state = state.failed()
        else:
            state = with_average(settings, state.advanced(adapter, AB), len(outcomes))
        found.append(state)
    return found


def ema_weights(decay, count):
    weights = np.array([decay ** (count - 1 - i) for i in range(count)])
    return weights / weights.sum()


def mean_product(weights, adapters, path):
    return sum(w * product(x, path) for w, x in zip(weights, adapters, strict=True))


def best(matrix, rank):
    """The best approximation of a rank, by numpy's dense SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def assert_is_the_mean(state, weights, adapters, sizes=SIZES, rank=RANK):
    final = final_adapter(state)
    assert set(final) == set(adapters[0])
    head = sum(w * wide(x[HEAD]) for w, x in zip(weights, adapters, strict=True))
    assert_near(wide(final[HEAD]), head)
    for path in sizes:
        exact = mean_product(weights, adapters, path)
        assert_near(product(state.average, path), exact, relative=2e-6)
        assert_near(product(final, path), best(exact, rank), relative=1e-5)
    for name, array in adapters[0].items():
        assert (final[name].shape, final[name].dtype) == (array.shape, np.float32)


@given(seed=SEEDS, decay=st.sampled_from([0.0, 0.3, 0.9, 0.999]), rounds=st.integers(1, 6))
@FEW
def test_an_exponential_average_is_that_of_the_dense_products(seed, decay, rounds):
    """The layers are so small that no rank is cut off."""
    adapters = walk(seed, rounds)
    states = averaged(f"ema:{decay}", adapters)
    for count, state in enumerate(states, start=1):
        assert_is_the_mean(state, ema_weights(decay, count), adapters[:count])


@given(seed=SEEDS, share=st.sampled_from(["1", "0.5", "0.7", "0.01"]), rounds=st.integers(1, 7))
@FEW
def test_a_tail_is_the_mean_of_the_last_rounds(seed, share, rounds):
    adapters = walk(seed, rounds)
    states = averaged(f"tail:{share}", adapters)
    last = -(-int(float(share) * 100) * rounds // 100)  # rounded up, in whole numbers
    first = rounds - last
    assert [state.averaged for state in states] == [max(0, i + 1 - first) for i in range(rounds)]
    for i, state in enumerate(states):
        if i < first:
            assert final_adapter(state) is state.adapter
        else:
            kept = adapters[first : i + 1]
            assert_is_the_mean(state, [1 / len(kept)] * len(kept), kept)


def test_the_length_of_a_tail_is_not_rounded_by_floats():
    """0.28 · 25 is 7.000000000000001 in floats, which would become eight rounds."""
    assert averaged("tail:0.28", walk(0, 25))[-1].averaged == 7
    assert averaged("tail:0.55", walk(0, 10))[-1].averaged == 6


def test_failed_attempts_count_as_rounds_of_the_run_and_add_nothing():
    one, two, three = walk(1, 3)
    states = averaged("tail:0.5", [one, None, two, None, three, None])
    assert [state.averaged for state in states] == [0, 0, 0, 0, 1, 1]
    assert final_adapter(states[-1]) == three
    states = averaged("tail:1", [None, one, None, two])
    assert_is_the_mean(states[-1], [0.5, 0.5], [one, two])
    states = averaged("tail:0.5", [one, two, None, None])  # the whole tail failed
    assert final_adapter(states[-1]) is two
    states = averaged("ema:0.5", [None, one, None, two])
    assert_is_the_mean(states[-1], [1 / 3, 2 / 3], [one, two])


@pytest.mark.parametrize("average", ["none", "ema:0", "tail:0.001"])
def test_an_average_of_the_last_round_only_is_that_rounds_adapter_bit_for_bit(average):
    adapters = walk(2, 5)
    final = final_adapter(averaged(average, adapters)[-1])
    assert list(final) == list(adapters[-1])
    assert all(final[n].tobytes() == x.tobytes() for n, x in adapters[-1].items())


def test_without_an_average_the_state_is_the_very_same():
    state = ServerState(walk(3, 1)[0]).advanced(walk(3, 1)[0], AB)
    assert with_average(settings_of("none"), state, 4) is state


def test_the_mean_of_products_is_not_the_product_of_means():
    adapters = walk(4, 4)
    final = final_adapter(averaged("tail:1", adapters)[-1])
    for b, a in PAIRS:
        means = [np.mean([wide(x[n]) for x in adapters], axis=0) for n in (b, a)]
        exact = np.mean([wide(x[b]) @ wide(x[a]) for x in adapters], axis=0)
        separate, ours = means[0] @ means[1], wide(final[b]) @ wide(final[a])
        assert np.linalg.norm(ours - exact) < 0.5 * np.linalg.norm(separate - exact)


@pytest.mark.parametrize("average", ["tail:1", "ema:0.8"])
@pytest.mark.parametrize("resting", ["A", "B"])
def test_with_one_factor_that_never_changes_long_averages_are_exact(average, resting):
    adapters = walk(5, 30, WIDE, resting=resting)
    state = averaged(average, adapters)[-1]
    weights = [1 / 30] * 30 if average == "tail:1" else ema_weights(0.8, 30)
    for path in WIDE:
        exact = mean_product(weights, adapters, path)
        assert_near(product(final_adapter(state), path), exact, relative=1e-5)
        assert len(state.average[f"{path}.lora_A.weight"]) == RANK


@pytest.mark.parametrize("average", ["tail:1", "ema:0.8"])
@given(seed=SEEDS)
@FEW
def test_the_rank_is_bounded_and_so_is_the_error_of_the_cut(average, seed):
    """Round by round as the bound says: four times the rank is kept, the rest is the error."""
    adapters = walk(seed, 10, WIDE)
    state, limit = averaged(average, adapters)[-1], 4 * RANK
    steps = [1 / k if average == "tail:1" else 0.2 / (1 - 0.8**k) for k in range(1, 11)]
    final = [1 / 10] * 10 if average == "tail:1" else ema_weights(0.8, 10)
    for path in WIDE:
        kept, bound = np.zeros(WIDE[path]), 0.0
        for weight, adapter in zip(steps, adapters, strict=True):
            whole = (1 - weight) * kept + weight * product(adapter, path)
            bound += tail(whole, limit)
            kept = best(whole, limit)
        ours = product(state.average, path)
        assert len(state.average[f"{path}.lora_A.weight"]) == limit
        assert_near(ours, kept, relative=1e-4)
        error = np.linalg.norm(ours - mean_product(final, adapters, path))
        assert 0 < error <= bound * (1 + 1e-4)


def test_rank_one_and_products_that_are_zero():
    adapters = walk(6, 3, rank=1)
    assert_is_the_mean(averaged("tail:1", adapters)[-1], [1 / 3] * 3, adapters, rank=1)
    zero = [{n: np.zeros_like(x) if "lora_B" in n else x for n, x in up.items()} for up in adapters]
    final = final_adapter(averaged("ema:0.5", zero)[-1])
    assert all(not product(final, path).any() for path in SIZES)
    assert all(np.isfinite(x).all() for x in final.values())


def test_layers_narrower_than_the_rank_keep_the_shapes_of_the_adapter():
    sizes = {"base_model.model.layer.0": (2, 9), "base_model.model.layer.1": (11, 2)}
    adapters = walk(7, 4, sizes)
    assert_is_the_mean(averaged("tail:1", adapters)[-1], [0.25] * 4, adapters, sizes)


def test_what_is_averaged_stays_as_it_is():
    adapters = walk(8, 3)
    kept = [{n: x.copy() for n, x in adapter.items()} for adapter in adapters]
    states = averaged("ema:0.5", adapters)
    final_adapter(states[-1])
    for now, before in zip(adapters, kept, strict=True):
        assert all(np.array_equal(now[n], before[n]) for n in before)
