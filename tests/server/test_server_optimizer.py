"""The strategy with the server's optimiser and average: what a round makes of the uploads."""

import numpy as np
import pytest

from conftest import make_config
from helpers.app_runs import same_bits
from helpers.server_rules import PAIRS, SIZES, assert_near, drawn, product, wide
from lalora_app.adapter.factors import select
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.methods.head_rounds import after_head_rounds
from lalora_app.methods.table import METHODS
from lalora_app.server.cohorts import Clients
from lalora_app.server.strategy import FederatedLora
from lalora_app.server_state.iterate_average import final_adapter
from lalora_app.server_state.state import ServerState
from lalora_app.wire.messages import TrainReply

NODES = (901, 17, 44444)
ADAM = {"server.optimizer": "adam", "server.lr": 0.05}


def make(method="dp-lora", attempts=6, **changes):
    keys = {"num-server-rounds": attempts, "min-replies": 2, "lora.rank": 3} | changes
    config = make_config(method=method, **keys)
    clients = Clients(NODES, [tuple(range(len(NODES)))] * attempts)
    start = METHODS[method].start(drawn(np.random.default_rng(0)), config.rule)
    return FederatedLora(config, METHODS[method], "run-1", clients, ServerState(start))


def uploads(strategy, seed):
    """What the clients of the next attempt send: values of their own."""
    rng, t = np.random.default_rng(seed), strategy.state.round + 1
    last = strategy.config.is_last(strategy.state.attempts + 1)
    whole = [
        {n: rng.standard_normal(x.shape).astype("f4") for n, x in strategy.state.adapter.items()}
        for _ in NODES
    ]
    return [select(one, strategy.method.sent(t, last=last)) for one in whole]


def one_round(strategy, seed):
    """Aggregate made-up uploads; return them with the measured errors."""
    sent, t = uploads(strategy, seed), strategy.state.round + 1
    replies = {node: TrainReply(up, t, 0.0) for node, up in zip(NODES, sent, strict=True)}
    return sent, strategy.aggregate_uploads(replies)


@pytest.mark.parametrize("method", list(METHODS))
def test_by_default_a_round_is_the_methods_own_rule_bit_for_bit(method):
    strategy = make(method)
    for t in (1, 2, 3):
        before = strategy.state.adapter
        sent, _ = one_round(strategy, t)
        info = RoundInfo(t=t, rounds=6, seed=0, numbers=strategy.config.rule)
        expected = strategy.method.aggregate(before, [1.0] * 3, sent, info).adapter
        assert same_bits(strategy.state.adapter, expected)
    state = strategy.state
    assert (state.first_moment, state.second_moment, state.average) == ({}, {}, {})
    assert final_adapter(state) is state.adapter


def test_the_server_steps_along_the_mean_of_what_travelled():
    strategy, m = make("la-lora", **{"server.optimizer": "momentum", "server.lr": 0.5}), {}
    for seed, travels in enumerate(("lora_B", "lora_A", "lora_B"), start=1):
        before = strategy.state.adapter
        sent, _ = one_round(strategy, seed)
        for name, array in before.items():
            if name not in sent[0]:
                assert "lora_" in name
                assert travels not in name
                assert strategy.state.adapter[name].tobytes() == array.tobytes()
                continue
            update = np.mean([wide(up[name]) for up in sent], axis=0) - wide(array)
            m[name] = 0.9 * m.get(name, 0.0) + update
            assert_near(strategy.state.adapter[name], wide(array) + 0.5 * m[name])


def test_the_centre_of_a_robust_mean_is_the_mean_update():
    strategy = make(robust="median", **{"server.lr": 0.25})
    before = strategy.state.adapter
    sent, _ = one_round(strategy, 1)
    for name, array in before.items():
        centre = np.median([up[name] for up in sent], axis=0)
        assert_near(strategy.state.adapter[name], 0.75 * wide(array) + 0.25 * centre)


def test_the_weights_of_the_clients_are_those_of_the_mean_update():
    strategy = make(weighting="public-size", **{"server.lr": 0.5})
    before, sent = strategy.state.adapter, uploads(strategy, 1)
    sizes = (100, 300, 600)
    strategy.aggregate_uploads(
        {
            node: TrainReply(up, 1, 0.0, size)
            for node, up, size in zip(NODES, sent, sizes, strict=True)
        }
    )
    for name, array in before.items():
        mean = sum(n / 1000 * wide(up[name]) for n, up in zip(sizes, sent, strict=True))
        assert_near(strategy.state.adapter[name], 0.5 * wide(array) + 0.5 * mean)


def test_the_measured_errors_are_those_of_the_methods_rule_without_the_step():
    plain, stepped = make(), make(**ADAM)
    assert one_round(plain, 1)[1] == one_round(stepped, 1)[1]
    assert not same_bits(plain.state.adapter, stepped.state.adapter)


def test_a_failed_attempt_keeps_moments_and_average():
    strategy = make(**ADAM, **{"server.average": "ema:0.5"})
    one_round(strategy, 1)
    before = strategy.state
    strategy.state = before.failed()
    for field in ("first_moment", "second_moment", "average", "averaged"):
        assert getattr(strategy.state, field) is getattr(before, field)


@pytest.mark.parametrize("method", ["la-lora", "flexlora", "fedsvd"])
def test_clients_start_from_the_last_round_and_not_from_the_average(method):
    """Also of rules that are no mean, and of rules that change the factors' coordinates."""
    plain, averaging = make(method), make(method, **{"server.average": "tail:1"})
    products = []
    for seed in (1, 2, 3):
        one_round(plain, seed)
        one_round(averaging, seed)
        products.append([product(plain.state.adapter, path) for path in SIZES])
        assert same_bits(averaging.state.adapter, plain.state.adapter)
        assert same_bits(averaging.download(0), plain.state.adapter)
    for path, found in zip(SIZES, zip(*products, strict=True), strict=True):
        u, s, vt = np.linalg.svd(np.mean(found, axis=0), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        assert_near(product(final_adapter(averaging.state), path), best, relative=1e-5)


def test_the_average_is_that_of_the_stepped_adapters():
    strategy = make(**ADAM, **{"server.average": "tail:1"})
    seen = []
    for seed in (1, 2):
        one_round(strategy, seed)
        seen.append(strategy.state.adapter)
    for b, a in PAIRS:
        mean = sum(wide(x[b]) @ wide(x[a]) for x in seen) / 2
        average = strategy.state.average
        assert_near(wide(average[b]) @ wide(average[a]), mean)


def test_class_sums_are_no_update_and_the_steps_of_the_head_begin_after_them():
    config = {"model.head": "class-means", "server.momentum": 0.5}
    strategy = make("rolora", **ADAM | config)
    strategy.method = after_head_rounds(strategy.method, strategy.config)
    before = strategy.state.adapter
    sent, _ = one_round(strategy, 1)
    info = RoundInfo(t=1, rounds=6, seed=0, numbers=strategy.config.rule)
    expected = strategy.method.aggregate(before, [1.0] * 3, sent, info).adapter
    assert same_bits(strategy.state.adapter, expected)
    assert strategy.state.first_moment == {}
    head = list(sent[0])
    after = {name: wide(strategy.state.adapter[name]) for name in head}
    sent, _ = one_round(strategy, 2)
    for name in head:  # Adam's first step: both corrections cancel the decays
        update = np.mean([wide(up[name]) for up in sent], axis=0) - after[name]
        assert_near(
            strategy.state.adapter[name], after[name] + 0.05 * update / (np.abs(update) + 1e-3)
        )
