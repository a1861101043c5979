"""The server's optimisers, compared with plain loops over single numbers in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_config
from helpers.server_rules import FEW, SEEDS, assert_near, drawn, wide
from lalora_app.adapter.factors import AB, A, B, kind, select
from lalora_app.server_state.optimizer_step import server_step
from lalora_app.server_state.state import ServerState

ADAPTIVE = ("adam", "yogi")
PHASES = {"both": [AB] * 5, "in turn": [B, A, B, A, B], "B only": [B] * 5}


def settings_of(optimizer: str, lr: float = 1.0, momentum: float = 0.9):
    keys = {"server.optimizer": optimizer, "server.lr": lr, "server.momentum": momentum}
    return make_config(**keys).server


def sign(number: float) -> float:
    return (number > 0) - (number < 0)


def entry_loop(optimizer, lr, beta, start, means):
    """The values of one entry after each of its rounds, by the formulas of the papers."""
    x, m, v, found = start, 0.0, 0.0, []
    for k, mean in enumerate(means, start=1):
        update = mean - x
        if optimizer == "sgd":
            x = x + lr * update
        elif optimizer == "momentum":
            m = beta * m + update
            x = x + lr * m
        else:
            m = beta * m + (1 - beta) * update
            if optimizer == "adam":
                v = 0.99 * v + 0.01 * update**2
            else:
                v = v - 0.01 * update**2 * sign(v - update**2)
            m_hat, v_hat = m / (1 - beta**k), v / (1 - 0.99**k)
            x = x + lr * m_hat / (math.sqrt(v_hat) + 1e-3)
        found.append(x)
    return found


def tensor_loop(optimizer, lr, beta, start, means):
    """A tensor after all its rounds, entry by entry."""
    found = np.array(wide(start))
    for place in np.ndindex(start.shape):
        values = [float(mean[place]) for mean in means]
        if values:
            found[place] = entry_loop(optimizer, lr, beta, float(start[place]), values)[-1]
    return found


def run(settings, start, weights, rounds):
    """The state after rounds of (factors that travel, whole adapters of the clients)."""
    state = ServerState(start)
    for factors, clients in rounds:
        uploads = [select(client, factors) for client in clients]
        state, stepped = server_step(settings, state, weights, uploads)
        state = state.advanced(state.adapter | stepped, factors)
    return state


def scaled(rng, scale):
    return {name: np.float32(scale) * x for name, x in drawn(rng).items()}


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", *ADAPTIVE])
@given(seed=SEEDS, lr=st.sampled_from([0.01, 0.5, 0.99]), beta=st.sampled_from([0.0, 0.5, 0.9]))
@FEW
def test_a_run_is_that_of_the_plain_loop(optimizer, phases, seed, lr, beta):
    """Updates of very different sizes, so that the second moment of Yogi also falls."""
    rng = np.random.default_rng(seed)
    start, weights = drawn(rng), [1.0, 2.5, 0.5]
    rounds = [
        (factors, [scaled(rng, scale) for _ in weights])
        for factors, scale in zip(PHASES[phases], (3.0, 1.0, 0.1, 2.0, 1.0), strict=True)
    ]
    state = run(settings_of(optimizer, lr, beta), start, weights, rounds)
    for name, first in start.items():
        travels = [clients for factors, clients in rounds if kind(name) in (*factors, "head")]
        means = [
            sum(w * wide(client[name]) for w, client in zip(weights, clients, strict=True)) / 4.0
            for clients in travels
        ]
        expected = tensor_loop(optimizer, lr, beta, first, means)
        assert_near(state.adapter[name], expected, relative=1e-5)
        assert state.adapter[name].dtype == np.float32


@pytest.mark.parametrize(
    ("optimizer", "kept"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("yogi", 2)]
)
def test_a_resting_factor_keeps_its_moments_bit_for_bit(optimizer, kept):
    rng = np.random.default_rng(1)
    rounds = [(factors, [drawn(rng), drawn(rng)]) for factors in (B, A, B)]
    settings, start = settings_of(optimizer, 0.1), drawn(rng)
    before, after = (run(settings, start, [1.0, 1.0], rounds[:n]) for n in (2, 3))
    for number, field in enumerate(("first_moment", "second_moment")):
        old, new = getattr(before, field), getattr(after, field)
        assert set(old) == set(new) == (set(start) if number < kept else set())
        for name in old:
            assert (old[name].tobytes() == new[name].tobytes()) == (kind(name) == "A"), name
    never = run(settings, start, [1.0, 1.0], rounds[:1])
    assert not [name for name in never.first_moment if kind(name) == "A"]


@given(seed=SEEDS, optimizer=st.sampled_from(["sgd", "momentum"]))
@FEW
def test_one_step_at_rate_one_without_earlier_rounds_is_the_mean(seed, optimizer):
    rng = np.random.default_rng(seed)
    start, client = drawn(rng), drawn(rng)
    state = run(settings_of(optimizer), start, [3.0], [(AB, [client])])
    for name in start:
        np.testing.assert_array_max_ulp(state.adapter[name], client[name], maxulp=1)


def test_momentum_without_decay_is_sgd():
    rng = np.random.default_rng(2)
    rounds, start = [(f, [drawn(rng), drawn(rng)]) for f in (B, A, AB)], drawn(rng)
    plain = run(settings_of("sgd", 0.3), start, [1.0, 2.0], rounds)
    other = run(settings_of("momentum", 0.3, 0.0), start, [1.0, 2.0], rounds)
    assert all(np.array_equal(plain.adapter[n], other.adapter[n]) for n in start)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_the_first_adaptive_step_is_the_sign_of_the_update_unless_it_is_small(optimizer):
    name = "classifier.bias"
    updates = np.array([5.0, -5.0, 1e-3, 0.0], np.float32)
    state = ServerState({name: np.zeros(4, np.float32)})
    stepped = server_step(settings_of(optimizer, 0.1), state, [1.0], [{name: updates}])[1]
    expected = 0.1 * updates / (np.abs(updates) + 1e-3)
    np.testing.assert_allclose(stepped[name], expected, rtol=1e-6)


def test_momentum_multiplies_a_constant_update_by_up_to_one_over_one_minus_the_decay():
    name, state = "classifier.bias", ServerState({"classifier.bias": np.zeros(1, np.float32)})
    for _ in range(100):
        last = state.adapter[name]
        state, stepped = server_step(
            settings_of("momentum", 1.0, 0.75), state, [1.0], [{name: last + np.float32(1)}]
        )
        state = state.advanced(stepped, AB)
    assert state.adapter[name] - last == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", *ADAPTIVE])
def test_clients_that_change_nothing_leave_the_adapter_as_it_is(optimizer):
    start = drawn(np.random.default_rng(3))
    state = run(settings_of(optimizer, 0.5), start, [1.0, 3.0], [(AB, [start, start])] * 3)
    for name in start:
        np.testing.assert_allclose(state.adapter[name], start[name], rtol=1e-6)


def test_what_the_step_is_given_stays_as_it_is():
    rng = np.random.default_rng(4)
    start, clients = drawn(rng), [drawn(rng), drawn(rng)]
    state = run(settings_of("adam", 0.1), start, [1.0, 1.0], [(AB, clients)])
    kept = [{n: x.copy() for n, x in part.items()} for part in (state.adapter, *clients)]
    moments = {n: x.copy() for n, x in state.second_moment.items()}
    server_step(settings_of("adam", 0.1), state, [1.0, 1.0], clients)
    for now, before in zip((state.adapter, *clients), kept, strict=True):
        assert all(np.array_equal(now[n], before[n]) for n in before)
    assert all(np.array_equal(state.second_moment[n], moments[n]) for n in moments)
