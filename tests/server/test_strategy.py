"""The strategy alone: hand-made replies to its own requests, no model and no client."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from conftest import make_config
from helpers.fake_grid import SERVER, identify, over_the_wire
from lalora_app.adapter.factors import select
from lalora_app.methods.table import METHODS
from lalora_app.server.cohorts import Clients
from lalora_app.server.strategy import FederatedLora
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import parse
from lalora_app.wire import messages, tensors
from lalora_app.wire.downlink import LEFT_OUT
from lalora_app.wire.messages import TrainReply
from lalora_app.wire.same_model import MODEL

A, B, HEAD = "l.lora_A.weight", "l.lora_B.weight", "classifier.weight"
SHAPES = {A: (2, 6), B: (4, 2), HEAD: (3, 4)}
NODES = (901, 17, 44444)


def adapter(value):
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def noisy(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def make(*, method="la-lora", cohorts=None, attempts=6, **changes):
    identify()
    base = {"num-server-rounds": attempts, "train.local-steps": 2, "min-replies": 2}
    config = make_config(method=method, **base | {"weighting": "uniform"} | changes)
    plan = cohorts or [tuple(range(len(NODES)))] * attempts
    clients = Clients(NODES, plan)
    start = METHODS[method].start(noisy(0), config.rule)
    return FederatedLora(config, METHODS[method], "run-1", clients, ServerState(start))


def asked(strategy):
    requests = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), None))
    for index, request in enumerate(requests):
        request.metadata.__dict__["_message_id"] = f"id-{index}"
    return [over_the_wire(request) for request in requests]


def synced(strategy, full):
    state, last = strategy.state, strategy.config.is_last(strategy.state.attempts + 1)
    more = {n: np.full_like(x, 0.1) for n, x in state.adapter.items()}
    fitting = {n: x for n, x in full.items() if n in more and x.shape == more[n].shape}
    return select(more | fitting, strategy.method.sent(state.round + 1, last=last))


def answer(request, upload, **changes):
    values = {"round": request.content["config"]["round"], "epsilon": 1.0} | changes
    return over_the_wire(Message(TrainReply(upload, **values).record(), reply_to=request))


def good(strategy, requests, seed=1):
    return [answer(r, synced(strategy, noisy((seed, r.metadata.dst_node_id)))) for r in requests]


def same_bits(one, other):
    return list(one) == list(other) and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def fail(strategy):
    """One attempt that nobody answers."""
    asked(strategy)
    return strategy.aggregate_train(1, [])


def succeed(strategy, seed=1):
    return strategy.aggregate_train(1, good(strategy, asked(strategy), seed))


# --- requests ---------------------------------------------------------------------------------


def test_a_request_holds_the_whole_adapter_and_its_order():
    strategy = make()
    requests = asked(strategy)
    expected = [messages.ARRAYS, messages.DRIFT, messages.CONFIG, MODEL]
    expected += [messages.RUN_CONFIG, LEFT_OUT]
    assert {r.metadata.dst_node_id for r in requests} == set(NODES)
    for request in requests:
        assert request.metadata.message_type == "train"
        assert {*request.content} == {*expected}
        assert not request.content[messages.DRIFT]
        assert parse(messages.run_config_of(request.content)) == strategy.config
        assert same_bits(
            tensors.from_record(request.content.array_records[messages.ARRAYS], adapter(0)),
            noisy(0),
        )
        order = messages.parse_request(request.content, strategy.config)
        assert order == messages.TrainRequest("run-1", 1, 1, 12, 12, {"A": 0, "B": 0})


def test_only_the_cohort_is_asked_and_its_steps_are_counted_down():
    strategy = make(cohorts=[(0, 2), (1, 2), (0, 1)], attempts=3, **{"min-replies": 2})
    left = []
    for _ in range(3):
        requests = asked(strategy)
        config = strategy.config
        orders = {
            r.metadata.dst_node_id: messages.parse_request(r.content, config) for r in requests
        }
        left.append({NODES.index(node): order.steps_left for node, order in orders.items()})
        strategy.aggregate_train(1, good(strategy, requests))
    assert left == [{0: 4, 2: 4}, {1: 4, 2: 2}, {0: 2, 1: 2}]


def test_nobody_is_asked_to_evaluate():
    strategy = make()
    assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), None)) == []
    assert strategy.aggregate_evaluate(1, []) is None


# --- phases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_the_phase_moves_with_successful_aggregations_only(method):
    strategy = make(method=method)
    history = []
    for works in (True, False, False, True, True, False):
        (succeed if works else fail)(strategy)
        history.append((strategy.attempts[-1].round, strategy.attempts[-1].aggregated))
    assert history == [(1, True), (2, False), (2, False), (2, True), (3, True), (4, False)]
    asked_for = [(1, False), (2, False), (2, False), (2, False), (3, False), (4, True)]
    sent = [METHODS[method].sent(t, last=last) for t, last in asked_for]
    phases = ["+".join(sorted(factors)) or "head" for factors in sent]
    assert [attempt.phase for attempt in strategy.attempts] == phases
    assert (strategy.state.round, strategy.state.attempts) == (3, 6)
    travelled = [METHODS[method].syncs(t) for t in (1, 2, 3)]
    assert strategy.state.versions == {f: sum(f in s for s in travelled) for f in "ABW"}


def test_flowers_own_round_number_plays_no_part():
    strategy = make()
    requests = list(strategy.configure_train(77, ArrayRecord(), ConfigRecord(), None))
    assert {messages.parse_request(r.content, strategy.config).round for r in requests} == {1}
    strategy.aggregate_train(78, good(strategy, requests))
    assert strategy.state.round == 1


@pytest.mark.parametrize("answers", [0, 1])
def test_a_failed_attempt_moves_nothing_but_the_count_of_attempts(answers):
    strategy = make()
    succeed(strategy)
    before = strategy.state
    bits = {name: array.tobytes() for name, array in before.adapter.items()}
    requests = asked(strategy)
    result = strategy.aggregate_train(2, good(strategy, requests, seed=2)[:answers])
    assert result == (None, None)
    assert {name: array.tobytes() for name, array in strategy.state.adapter.items()} == bits
    assert (strategy.state.round, strategy.state.versions) == (1, before.versions)
    assert strategy.state.attempts == before.attempts + 1
    attempt = strategy.attempts[-1]
    assert (attempt.aggregated, attempt.replies, attempt.round) == (False, answers, 2)
    again = [messages.parse_request(r.content, strategy.config) for r in asked(strategy)]
    assert {(order.round, order.attempt) for order in again} == {(2, 3)}


def test_what_a_rule_keeps_waits_for_its_next_round_and_reaches_no_client():
    strategy = make(method="beamlora", **{"rule.period": 2})
    succeed(strategy)
    kept, adapter = strategy.state.memory, strategy.state.adapter
    assert set(kept) == {A, B}
    assert all(kept[name] is adapter[name] for name in kept)
    fail(strategy)
    assert strategy.state.memory is kept
    (request, *_) = asked(strategy)
    assert set(request.content[messages.ARRAYS]) <= set(adapter)
    seen = []
    rule = strategy.method.aggregate
    strategy.method = replace(
        strategy.method, aggregate=lambda *args: seen.append(args[3].memory) or rule(*args)
    )
    succeed(strategy)
    assert seen == [kept]
    assert strategy.state.memory == {}


# --- aggregation ------------------------------------------------------------------------------


def test_the_mean_of_the_uploads_replaces_what_travelled_and_nothing_else():
    strategy = make()
    requests = asked(strategy)
    replies = good(strategy, requests)
    arrays, metrics = strategy.aggregate_train(1, replies)
    uploads = [noisy((1, node)) for node in NODES]
    for name in (B, HEAD):
        mean = np.mean([u[name].astype(np.float64) for u in uploads], axis=0)
        np.testing.assert_allclose(strategy.state.adapter[name], mean, rtol=1e-6, atol=1e-7)
        assert strategy.state.adapter[name].dtype == np.float32
    assert strategy.state.adapter[A].tobytes() == noisy(0)[A].tobytes()
    assert metrics is None
    assert same_bits(tensors.from_record(arrays, adapter(0)), strategy.state.adapter)


def test_one_reply_is_its_own_mean():
    strategy = make(**{"min-replies": 1})
    request = asked(strategy)[0]
    upload = synced(strategy, noisy(5))
    strategy.aggregate_train(1, [answer(request, upload)])
    assert same_bits(synced_of_first_round(strategy), upload)


def synced_of_first_round(strategy):
    return select(strategy.state.adapter, strategy.method.syncs(1))


def weighted(weighting, sizes):
    strategy = make(weighting=weighting)
    requests = asked(strategy)
    replies = [
        answer(r, synced(strategy, adapter(float(i))), num_examples=size)
        for i, (r, size) in enumerate(zip(requests, sizes, strict=True))
    ]
    strategy.aggregate_train(1, replies)
    return strategy


def test_weights_are_uniform_whatever_the_sizes():
    strategy = weighted("uniform", (1, 1000, 10**6))
    assert np.unique(strategy.state.adapter[B]) == pytest.approx([1.0])
    assert weighted("uniform", (None, None, 7)).attempts[-1].replies == 3


def test_weights_follow_public_sizes():
    strategy = weighted("public-size", (100, 200, 500))
    expected = (0 * 100 + 1 * 200 + 2 * 500) / 800
    assert np.unique(strategy.state.adapter[B]) == pytest.approx([expected])


def test_a_client_that_keeps_its_size_has_no_public_weight():
    strategy = weighted("public-size", (100, None, 300))
    assert np.unique(strategy.state.adapter[B]) == pytest.approx([2 * 300 / 400])
    attempt = strategy.attempts[-1]
    assert (attempt.replies, attempt.aggregated) == (2, True)
    assert attempt.dropped == ('weighting="public-size" needs a size, and the client sends none',)
    assert not weighted("public-size", (100, None, None)).attempts[-1].aggregated


# --- bad replies ------------------------------------------------------------------------------


def changed(request, upload, change: Callable[[RecordDict], None]):
    content = TrainReply(upload, request.content["config"]["round"], 1.0).record()
    change(content)
    return over_the_wire(Message(content, reply_to=request))


def bad_replies(request, upload):
    nan, inf = ({**upload, B: upload[B].copy()} for _ in range(2))
    nan[B][0, 0], inf[B][-1, -1] = np.nan, np.inf
    huge = {**upload, B: upload[B] * np.float32(1e20)}
    unreadable = Array("float32", SHAPES[B], "numpy.ndarray", b"\x93NUMPY")

    def other_code(content):
        content.config_records[messages.CONFIG]["code"] = "0" * 64

    def damaged(content):
        content.array_records[messages.ARRAYS][B] = unreadable

    def error(code, node):
        reply = Message(Error(code, "SECRET-1"), reply_to=request)
        reply.metadata.__dict__["_src_node_id"] = node
        return over_the_wire(reply)

    refused = over_the_wire(Message(messages.refusal("budget"), reply_to=request))
    return {
        "the client raised": (error(2, request.metadata.dst_node_id), "error 2"),
        "its node is gone": (error(5, SERVER), "error 5"),
        "NaN": (answer(request, nan), B),
        "infinity": (answer(request, inf), B),
        "a huge norm": (answer(request, huge), B),
        "shape": (answer(request, {**upload, B: upload[B][:1]}), B),
        "dtype": (answer(request, {**upload, B: upload[B].astype(np.float64)}), B),
        "damaged": (changed(request, upload, damaged), B),
        "a round ago": (answer(request, upload, round=2), "stale"),
        "a round ahead": (answer(request, upload, round=4), "stale"),
        "missing tensor": (answer(request, {B: upload[B]}), f"{HEAD} is missing"),
        "resting factor": (answer(request, noisy(9)), f"{A} is unexpected"),
        "epsilon": (answer(request, upload, epsilon=float("nan")), "epsilon=nan"),
        "other code": (changed(request, upload, other_code), "other code"),
        "refusal": (refused, "a privacy limit of the client would be exceeded"),
        "empty": (over_the_wire(Message(RecordDict(), reply_to=request)), "other code"),
    }


def at_round_3():
    strategy = make()
    succeed(strategy, 11)
    succeed(strategy, 12)
    return strategy


def kinds():
    identify()
    request = Message(
        RecordDict({"config": ConfigRecord({"round": 3})}), dst_node_id=5, message_type="train"
    )
    return list(bad_replies(request, {B: noisy(0)[B], HEAD: noisy(0)[HEAD]}))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("position", [0, 2])
def test_a_bad_reply_is_dropped_and_told_and_the_others_count(kind, position):
    strategy, reference = at_round_3(), at_round_3()
    requests = asked(strategy)
    replies = good(strategy, requests)
    others = [reply for i, reply in enumerate(replies) if i != position]
    bad, words = bad_replies(requests[position], synced(strategy, noisy(7)))[kind]
    replies[position] = bad
    arrays, _ = strategy.aggregate_train(3, replies)
    assert arrays is not None
    asked(reference)
    reference.aggregate_train(3, others)
    assert same_bits(strategy.state.adapter, reference.state.adapter)
    attempt = strategy.attempts[-1]
    assert (attempt.replies, attempt.aggregated, len(attempt.dropped)) == (2, True, 1)
    assert words in attempt.dropped[0]
    assert "SECRET" not in attempt.dropped[0]
    assert "\n" not in attempt.dropped[0]


def test_bad_replies_only_fail_the_attempt_and_each_is_told():
    strategy = at_round_3()
    before = strategy.state
    requests = asked(strategy)
    upload = synced(strategy, noisy(7))
    replies = [
        bad_replies(request, upload)[kind][0]
        for request, kind in zip(requests, ("NaN", "other code", "refusal"), strict=True)
    ]
    assert strategy.aggregate_train(3, replies) == (None, None)
    assert len(strategy.attempts[-1].dropped) == 3
    assert same_bits(strategy.state.adapter, before.adapter)
    assert succeed(strategy)[0] is not None
    assert strategy.state.round == 3


@pytest.mark.parametrize(("missing", "line"), [(1, "1 did not"), (2, "2 did not")])
def test_missing_replies_are_told(missing, line):
    strategy = make(**{"min-replies": 1})
    strategy.aggregate_train(1, good(strategy, asked(strategy))[missing:])
    attempt = strategy.attempts[-1]
    assert attempt.dropped == (f"{line} answer in time",)
    assert attempt.replies == 3 - missing


def test_a_repeated_reply_counts_once():
    strategy, reference = make(), make()
    replies = good(strategy, asked(strategy))
    strategy.aggregate_train(1, [replies[0], replies[1], replies[0], replies[2]])
    succeed(reference)
    assert strategy.attempts[-1].replies == 3
    np.testing.assert_allclose(
        strategy.state.adapter[B], reference.state.adapter[B], rtol=1e-6, atol=1e-7
    )


def test_a_good_and_a_bad_reply_of_one_client():
    strategy = make()
    requests = asked(strategy)
    replies = good(strategy, requests)
    extra, words = bad_replies(requests[0], synced(strategy, noisy(7)))["NaN"]
    strategy.aggregate_train(1, [*replies, extra])
    assert strategy.attempts[-1].replies == 3
    assert all(words in reason for reason in strategy.attempts[-1].dropped)


def test_a_reply_of_a_node_that_was_not_asked_does_not_count():
    strategy = make(cohorts=[(0, 1)] * 6)
    requests = asked(strategy)
    stranger = Message(
        RecordDict({"config": ConfigRecord({"round": 1})}),
        dst_node_id=NODES[2],
        message_type="train",
    )
    replies = [*good(strategy, requests), answer(stranger, synced(strategy, adapter(1e6)))]
    strategy.aggregate_train(1, replies)
    assert strategy.attempts[-1].replies == 2
    assert strategy.state.adapter[B].max() < 1e3


def test_the_order_of_arrival_plays_no_part():
    results = []
    for order in ([0, 1, 2], [0, 2, 1]):
        strategy = make()
        values = {NODES[0]: 2.0**60, NODES[1]: 3.0, NODES[2]: -(2.0**60)}
        replies = [
            answer(r, synced(strategy, adapter(values[r.metadata.dst_node_id])))
            for r in asked(strategy)
        ]
        strategy.aggregate_train(1, [replies[i] for i in order])
        results.append(strategy.state.adapter)
    assert same_bits(*results)


# --- accounting -------------------------------------------------------------------------------


def epsilon_after(strategy, epsilons):
    """Run an attempt in which the clients report these; None: its reply is lost."""
    requests = asked(strategy)
    replies = [
        answer(request, synced(strategy, noisy(3)), epsilon=spent)
        for request, spent in zip(requests, epsilons, strict=True)
        if spent is not None
    ]
    strategy.aggregate_train(1, replies)
    return strategy.attempts[-1].epsilon_max


def test_epsilon_max_is_the_maximum_over_clients():
    strategy = make()
    assert epsilon_after(strategy, (0.5, 2.5, 1.0)) == 2.5
    assert epsilon_after(strategy, (2.6, 2.5, 1.5)) == 2.6
    assert epsilon_after(strategy, (2.7, 2.5, float("inf"))) == float("inf")


def test_a_lost_reply_may_have_cost_the_whole_promise():
    strategy = make(**{"privacy.epsilon": 7.0, "min-replies": 1})
    assert epsilon_after(strategy, (0.5, 1.0, 1.5)) == 1.5
    assert epsilon_after(strategy, (0.6, None, 1.6)) == 7.0
    assert epsilon_after(strategy, (0.7, 2.5, 1.7)) == 2.5  # told again


def test_epsilon_max_covers_those_who_rest():
    strategy = make(cohorts=[(0, 1), (0, 2), (1, 2), (0, 1)])
    assert epsilon_after(strategy, (0.5, 2.5)) == 2.5
    assert epsilon_after(strategy, (0.6, 0.7)) == 2.5


def test_a_client_never_spends_less_than_it_has_reported():
    strategy = make()
    assert epsilon_after(strategy, (0.5, 2.5, 1.0)) == 2.5
    assert epsilon_after(strategy, (0.6, 0.1, 1.1)) == 2.5


def test_epsilon_of_a_failed_attempt_is_spent_all_the_same():
    strategy = make(cohorts=[(0,)] * 6, **{"privacy.epsilon": 7.0})
    assert epsilon_after(strategy, (4.5,)) == 4.5
    assert not strategy.attempts[-1].aggregated


def tensor_bytes(message):
    records = message.content.array_records.values()
    return sum(4 * int(np.prod(a.shape)) for record in records for a in record.values())


@pytest.mark.parametrize("method", list(METHODS))
def test_byte_counts_are_those_of_the_messages(method):
    strategy = make(method=method)
    starts = []
    for seed in range(3):
        starts.append(strategy.state.adapter)
        requests = asked(strategy)
        replies = good(strategy, requests, seed)
        strategy.aggregate_train(1, replies)
        attempt = strategy.attempts[-1]
        assert {tensor_bytes(r) for r in requests} == {attempt.download_bytes}
        assert {tensor_bytes(r) for r in replies} == {attempt.upload_bytes}
    more = not set(strategy.state.adapter) <= set(SHAPES)  # changes and second moments
    if more or METHODS[method].moves_base or METHODS[method].effective:
        return  # more than the factors travels
    sizes = {name: 4 * int(np.prod(SHAPES[name])) for name in strategy.state.adapter}
    assert set(sizes) == ({HEAD} if method == "head-only" else set(SHAPES))
    sent = METHODS[method].syncs(3)
    expected = sum(sizes[name] for name in select(strategy.state.adapter, sent))
    assert expected == 4 * (12 + 12 * ("A" in sent) + 8 * ("B" in sent))
    assert strategy.attempts[-1].upload_bytes == expected
    assert strategy.attempts[0].download_bytes == sum(sizes.values())
    moved = sum(size for n, size in sizes.items() if (starts[2][n] != starts[1][n]).any())
    assert strategy.attempts[-1].download_bytes == moved


def test_nobody_answered_is_no_byte_up():
    strategy = make()
    fail(strategy)
    assert (strategy.attempts[-1].upload_bytes, strategy.attempts[-1].replies) == (0, 0)
