"""Test the contents of replies and refusals: no private value leaves a client."""

from collections import Counter

import pytest
from flwr.app import Context, Message, RecordDict

from helpers.app_runs import (
    DELTA,
    EPSILON,
    TRAIN_SIZE,
    contents,
    ledger_entries,
    open_run,
    run,
    sized,
    sizes_told,
)
from helpers.fake_grid import FakeGrid, identify, wire_bytes
from lalora_app import client_app, server_app
from lalora_app.adapter.factors import kind
from lalora_app.client import local_round, site
from lalora_app.methods.table import METHODS
from lalora_app.privacy.budget import BudgetError
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.site_files import resident_factors
from lalora_app.wire import refusals, tensors

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


@pytest.mark.parametrize("public", [False, True])
def test_nothing_but_the_allowed_keys_leaves_a_client(tiny, public):
    nodes = [{}, {"max-epsilon": EPSILON / 10, "delta": DELTA}, {}]  # too small: refused
    config = tiny(**sized(3) | {"data.public-size": public})
    done = run(config, nodes)
    sizes = {"num-examples"} if public else set()
    seen = Counter()
    for exchange in done.grid.exchanges:
        assert not exchange.reply.has_error()
        got = contents(exchange.reply)
        if exchange.attempt == 0:
            hashes = {"weights", "tokenizer"}
            assert got == {"config": {"client", "rank", "code"}, "model": hashes}
        elif exchange.partition == 1:
            assert got == {"config": {"refusal"}}
        else:
            synced = METHODS["la-lora"].syncs(exchange.order["round"]) | {"head"}
            allowed = {n for n in exchange.start if kind(n) in synced}
            metrics = {"round", "epsilon"} | sizes
            assert got == {"arrays": allowed, "metrics": metrics, "config": {"code"}}
            if public:
                assert exchange.reply.content["metrics"]["num-examples"] == TRAIN_SIZE // 3
        seen[len(got)] += 1
    assert seen == {1: 3, 2: 3, 3: 6}


@pytest.mark.parametrize("public", [False, True])
def test_a_nodes_own_word_about_its_size_wins(tiny, public):
    config = tiny(**open_run(3) | {"data.public-size": public, "num-server-rounds": 1})
    done = run(config, [{"public-size": True}, {"public-size": False}, {}])
    assert sizes_told(done) == ({0, 2} if public else {0})


def test_a_size_is_public_by_a_boolean_only(tiny):
    config = tiny(**open_run(3) | {"num-server-rounds": 1})
    grid = FakeGrid(config, [{}, {"public-size": "false"}, {}])
    with pytest.raises(ConfigError, match="node config breaks a law"):
        server_app.run(grid, config)
    assert grid.trained() == []


SECRET = "SECRET-7f3a"
FAILURES = [
    RuntimeError(f"row 17: {SECRET}"),
    DataError("data.num-labels", f"=2: row 5 has label {SECRET}"),
    DataError(SECRET, "a key that nobody knows"),
    ConfigError(SECRET),
    tensors.WireError(SECRET),
    BudgetError(SECRET),
    KeyError(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_every_exception_becomes_a_fixed_refusal(error):
    def fail(message, context):
        raise error

    identify()
    request = Message(RecordDict(), dst_node_id=7, message_type="train")
    reply = client_app._answer(request, Context(1, 7, {}, RecordDict(), {}), fail)
    assert contents(reply) == {"config": {"refusal"}}
    assert reply.content["config"]["refusal"] in refusals.REFUSALS
    assert SECRET.encode() not in wire_bytes(reply)


@pytest.mark.parametrize("where", ["query", "before the ledger", "after the ledger"])
@pytest.mark.parametrize("error", FAILURES[:2], ids=lambda error: type(error).__name__)
def test_no_text_of_an_exception_leaves_a_client(tiny, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error

    module, name = {
        "query": (site, "clients_data"),
        "before the ledger": (resident_factors, "with_residents"),
        "after the ledger": (local_round, "run_round"),
    }[where]
    monkeypatch.setattr(module, name, fail)
    config = tiny(**open_run() | {"num-server-rounds": 1})
    grid = FakeGrid(config, 2)
    with pytest.raises((RuntimeError, ConfigError)) as caught:
        server_app.run(grid, config)
    assert SECRET not in str(caught.value)
    failed = [e.reply for e in grid.exchanges if e.attempt == (where != "query")]
    assert len(failed) == 2
    for reply in failed:
        assert contents(reply) == {"config": {"refusal"}}
    assert not any(SECRET.encode() in wire_bytes(reply) for reply in grid.replies())
    spent = {"after the ledger": 2}.get(where, 0)  # what is reserved counts, drawn or not
    assert len(ledger_entries()) == spent
