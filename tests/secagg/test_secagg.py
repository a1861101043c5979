"""Secure aggregation: the sum is right, and no single summand is anywhere on the server.

The runs go through the real ServerApp, Strategy and ClientApps, over FakeGrid, with four clients:
three of them make a sum, so one may drop out at any stage.
"""

import contextlib
import secrets
from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import app_runs
from helpers.app_runs import (
    arrays,
    by_dataset,
    crash_before,
    fresh,
    interrupted,
    ledger_entries,
    open_run,
    run,
    same_bits,
    sized,
)
from helpers.fake_grid import FakeGrid, wire_bytes
from helpers.simulation_runs import run_toml, summaries
from lalora_app import client_app, server_app
from lalora_app.adapter.factors import active_names, select
from lalora_app.client import local_round
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.table import METHODS
from lalora_app.models import backbone
from lalora_app.secagg import fixed_point, masks
from lalora_app.secagg.messages import MASKED, SECAGG, columns, mapping_of
from lalora_app.server import ending
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten
from lalora_app.wire import messages, tensors
from lalora_app.wire.refusals import REFUSALS
from lalora_app.wire.tensors import WireError

pytestmark = pytest.mark.usefixtures("no_waiting")
CLIENTS, ON = 4, {"secure-aggregation": "secagg+"}
STAGES = ("train.advertise", "train.share", "train", "train.unmask")
SMALLEST = 2.0**-149  # of float32, subnormal


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The page of curves takes longer than the run, and other tests look at it."""
    monkeypatch.setattr(ending, "_write_report", lambda folder: None)


# --- integers ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    clients=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-40, 6),
    data=st.data(),
)
def test_the_mean_of_quantised_updates_is_the_mean_of_the_updates(clients, seed, exponent, data):
    summands = data.draw(st.integers(1, clients))
    rng = np.random.default_rng(seed)
    updates = rng.uniform(-1, 1, (summands, 50)) * min(2.0**exponent, fixed_point.MAX_UPDATE)
    updates[:, :2] = fixed_point.MAX_UPDATE, -fixed_point.MAX_UPDATE  # the sum is largest here
    total = np.zeros(50, np.uint32)
    for update in updates:
        total = total + fixed_point.quantise(update, clients)
    found = fixed_point.dequantised_mean(total, clients, summands)
    assert np.abs(found - updates.mean(axis=0)).max() <= fixed_point.error_bound(clients)


def test_the_bound_is_met_and_is_no_larger_than_it_must_be():
    half = np.array([0.5 * fixed_point.step_size(4) * (1 - 1e-9)])  # rounds to zero
    found = fixed_point.dequantised_mean(fixed_point.quantise(half, 4), 4, 1)
    assert 0.99 < abs(found - half)[0] / fixed_point.error_bound(4) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 64.01, -64.01, 1e30])
def test_what_the_sum_cannot_hold_is_refused_and_not_clipped(value):
    with pytest.raises(fixed_point.RangeError):
        fixed_point.quantise(np.array([0.0, value]), 4)


def test_tensors_come_back_from_the_flat_vector():
    rng = np.random.default_rng(0)
    shapes = {"z": (2, 3), "a": (4,), "m": (1, 5)}
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    upload = {n: rng.standard_normal(s).astype(np.float32) for n, s in reversed(shapes.items())}
    found = fixed_point.add_update(start, fixed_point.update_of(upload, start))
    assert set(found) == set(upload)
    assert all(np.array_equal(found[n], upload[n]) for n in upload)


# --- masks ------------------------------------------------------------------------------------


def test_what_two_clients_add_for_each_other_cancels():
    one, other = masks.new_private_key(), masks.new_private_key()
    secret = masks.shared_secret(one, masks.public_key_of(other))
    assert secret == masks.shared_secret(other, masks.public_key_of(one))
    total = masks.pair_mask(3, 8, secret, 999) + masks.pair_mask(8, 3, secret, 999)
    assert not total.any()


def test_a_mask_depends_on_all_of_its_key():
    """Flower's own generator folds its seed to 32 bits: swapped words give the same mask."""
    key = secrets.token_bytes(32)
    swapped = key[4:8] + key[:4] + key[8:]
    alike = masks.mask(key, 1000) == masks.mask(swapped, 1000)
    assert alike.mean() < 0.01
    for bit in range(256):
        flipped = (int.from_bytes(key, "big") ^ 1 << bit).to_bytes(32, "big")
        assert (masks.mask(key, 8) != masks.mask(flipped, 8)).any()


@pytest.mark.parametrize("clients", [2, 3, 4, 7])
def test_a_secret_takes_its_threshold_of_shares(clients):
    secret = secrets.token_bytes(masks.KEY_BYTES)
    shares = masks.split_into_shares(secret, range(clients))
    needed = masks.threshold(clients)
    assert 2 <= needed <= clients < 2 * needed
    last = dict(list(shares.items())[-needed:])
    assert masks.reconstruct_secret(last, clients) == secret
    with pytest.raises(WireError, match="too few"):
        masks.reconstruct_secret(dict(list(shares.items())[1:needed]), clients)
    forged = last | {clients - 1: b"\xff" * len(shares[0])}
    with contextlib.suppress(WireError):
        assert masks.reconstruct_secret(forged, clients) != secret


@pytest.mark.parametrize("junk", [b"", b"junk", masks.public_key_of(masks.new_private_key())[:-40]])
def test_a_public_key_that_is_none_is_told(junk):
    with pytest.raises(WireError, match="P-384"):
        masks.shared_secret(masks.new_private_key(), junk)


# --- the sum ----------------------------------------------------------------------------------


def lose(stage, attempt, *partitions):
    """Lose the replies of some clients at one stage of one attempt."""

    def fault(now, partition, reply):
        lost = (now, reply.metadata.message_type) == (attempt, stage) and partition in partitions
        return None if lost else reply

    return fault


def uploads(done, rounds, attempt):
    """What each client would have sent without secure aggregation, by partition."""
    method, found = METHODS[done.config.method], {}
    for exchange, local in zip(done.grid.trained(), rounds, strict=True):
        if exchange.attempt == attempt:
            sent = method.sent(local.t, last=done.config.is_last(attempt))
            found[exchange.partition] = select(local.result, sent)
    return found


def states(done):
    """The global adapter before each attempt, and the last one."""
    attempts = range(1, done.config.num_server_rounds + 1)
    known = [exchange.start for attempt in attempts for exchange in done.grid.trained(attempt)[:1]]
    return [*known, done.folder.latest().adapter]


def assert_mean(found, summands, clients):
    bound = fixed_point.error_bound(clients)
    for name in summands[0]:
        wanted = np.mean([upload[name].astype(np.float64) for upload in summands], axis=0)
        rounding = np.abs(wanted) * 2.0**-24 + SMALLEST
        assert (np.abs(found[name] - wanted) <= bound + rounding).all(), name


def test_the_bound_on_a_float_is_one_that_another_mean_breaks():
    values = [{"x": np.float32([i, 2 * i])} for i in (1, 2, 4)]
    assert_mean({"x": np.float32([7 / 3, 14 / 3])}, values, 3)
    with pytest.raises(AssertionError):
        assert_mean({"x": np.float32([7 / 3, 14 / 3 + 1e-5])}, values, 3)


@pytest.mark.parametrize("method", ["la-lora", "dp-lora", "sd-lora", "fedrot-lora"])
def test_what_is_aggregated_is_the_mean(tiny, rounds, method):
    done = run(tiny(**open_run(CLIENTS) | ON | {"method": method}), CLIENTS)
    assert [row["replies"] for row in done.rows] == [CLIENTS] * 3
    assert [row["dropped"] for row in done.rows] == [[]] * 3
    for attempt, (before, after) in enumerate(pairwise(states(done)), 1):
        sent = list(uploads(done, rounds, attempt).values())
        if METHODS[method].aggregate is METHODS["la-lora"].aggregate or attempt == 1:
            assert_mean(after, sent, CLIENTS)
        still = set(before) - set(sent[0])
        assert all(np.array_equal(before[name], after[name]) for name in still) or attempt > 1
        assert any(not np.array_equal(before[name], after[name]) for name in sent[0])


@pytest.mark.parametrize("stage", STAGES)
def test_one_client_may_drop_out_at_any_stage(tiny, rounds, stage):
    config = tiny(**open_run(CLIENTS) | ON)
    done = run(config, CLIENTS, fault=lose(stage, 2, 1))
    assert [row["aggregated"] for row in done.rows] == [True] * 3
    told = {"train": "1 did not answer in time"}
    told = told.get(stage, f"{stage.removeprefix('train.')}: 1 did not answer in time")
    assert done.rows[1]["dropped"] == [told]
    sent = uploads(done, rounds, 2)
    trains = stage in ("train", "train.unmask")
    assert set(sent) == {0, 1, 2, 3} if trains else {0, 2, 3}
    counted = {0, 1, 2, 3} if stage == "train.unmask" else {0, 2, 3}
    assert done.rows[1]["replies"] == len(counted)
    directory = 3 if stage == "train.advertise" else 4
    summands = [upload for partition, upload in sent.items() if partition in counted]
    assert_mean(done_state(done, 2), summands, directory)
    # The rounds before and after are whole, and nobody has spent twice.
    assert_mean(done_state(done, 1), list(uploads(done, rounds, 1).values()), CLIENTS)
    assert_mean(done_state(done, 3), list(uploads(done, rounds, 3).values()), CLIENTS)
    books = by_dataset(ledger_entries())
    assert sorted(len(book) for book in books.values()) == [3 - (not trains), 3, 3, 3]


def done_state(done, attempt):
    return states(done)[attempt]


def test_a_sum_is_as_good_as_the_uploads(tiny, tmp_path, monkeypatch):
    """One round with seeded noise, with and without: the same adapter to the bound."""
    changes = open_run(CLIENTS) | {"privacy.noise": "seeded", "num-server-rounds": 1}
    config = fresh(tiny, tmp_path, monkeypatch, "plain", **changes)
    plain = run(config, CLIENTS).folder.latest()
    masked = run(fresh(tiny, tmp_path, monkeypatch, "masked", **changes | ON), CLIENTS)
    found = masked.folder.latest().adapter
    bound = fixed_point.error_bound(CLIENTS)
    for name, array in plain.adapter.items():
        assert np.abs(found[name] - array).max() <= bound + 2.0**-23 * np.abs(array).max(), name
    # What only single uploads tell is not told.
    (row,) = masked.rows
    for key in ("aggregation_error", "remaining_error", "update_cosine"):
        assert row[key] is None
    (exchange, *_) = masked.grid.trained()
    assert row["upload_bytes"] == arrays(exchange.reply)[MASKED].nbytes


# --- what the server sees ---------------------------------------------------------------------


def words_of(upload, start):
    return fixed_point.quantise(fixed_point.update_of(upload, start), CLIENTS)


def assert_unrelated(masked, hidden):
    """Correlation within five standard errors of zero."""
    found = np.corrcoef(masked.astype(np.float64), hidden)[0, 1]
    assert abs(found) < 5 / np.sqrt(masked.size)


def test_no_message_to_the_server_holds_a_clients_factor(tiny, rounds):
    done = run(tiny(**sized(CLIENTS) | ON), CLIENTS, fault=lose("train", 2, 1))
    everything = [wire_bytes(reply) for reply in done.grid.replies()]
    assert len(done.grid.trained()) == len(rounds) == 3 * CLIENTS
    for exchange, local in zip(done.grid.trained(), rounds, strict=True):
        start = exchange.start
        sent = uploads(done, rounds, exchange.attempt)[exchange.partition]
        start = {name: start[name] for name in sent}
        words = words_of(sent, start)
        assert any(local.result[name].tobytes() != start[name].tobytes() for name in sent)
        assert set(exchange.reply.content["arrays"]) == {MASKED}
        masked = arrays(exchange.reply)[MASKED]
        assert masked.dtype == np.uint32
        for hidden in [*sent.values(), words]:
            assert not any(hidden.tobytes()[:64] in message for message in everything)
        assert_unrelated(masked, fixed_point.update_of(sent, start))
        assert_unrelated(masked, words.astype(np.float64))
        assert_unrelated(masked.view(np.int32), words.view(np.int32).astype(np.float64))
    for one, other in pairwise(done.grid.trained(1)):  # nor do two vectors share a mask
        first, second = (arrays(exchange.reply)[MASKED] for exchange in (one, other))
        assert_unrelated(first, second.astype(np.float64))


def test_the_check_for_a_factor_in_a_message_can_fail(tiny, rounds):
    done = run(tiny(**open_run(CLIENTS) | {"num-server-rounds": 1}), CLIENTS)  # in the clear
    exchange = done.grid.trained()[0]
    hidden = next(iter(uploads(done, rounds, 1)[exchange.partition].values()))
    assert hidden.tobytes()[:64] in wire_bytes(exchange.reply)
    words = words_of({"x": hidden}, {"x": np.zeros_like(hidden)})
    with pytest.raises(AssertionError):
        assert_unrelated(words.view(np.int32), hidden.ravel().astype(np.float64))


def test_nothing_but_the_allowed_keys_leaves_a_client(tiny):
    done = run(tiny(**sized(CLIENTS) | ON), CLIENTS)
    allowed = {
        "query": {"config": {"client", "rank", "code"}},
        "train.advertise": {"config": {"code"}, SECAGG: {"mask-key", "cipher-key"}},
        "train.share": {"config": {"code"}, SECAGG: {"shares-of", "shares", "seed"}},
        "train": {"arrays": {MASKED}, "metrics": {"round", "epsilon"}, "config": {"code"}},
        "train.unmask": {"config": {"code"}, SECAGG: {"shares-of", "shares"}},
    }
    seen = Counter()
    for exchange in done.grid.exchanges:
        kind = exchange.request.metadata.message_type
        assert app_runs.contents(exchange.reply) == allowed[kind]
        seen[kind] += 1
    assert seen == {"query": CLIENTS} | dict.fromkeys(STAGES, 3 * CLIENTS)


def given_by(exchange):
    """Which secret of every client a reply to `unmask` gives a share of."""
    order = exchange.request.content[SECAGG]
    return {c: "seed" for c in order["arrived"]} | {c: "key" for c in order["lost"]}


def test_a_vector_that_comes_late_stays_closed(tiny):
    """Of a client that is counted as lost the server learns the mask key, and never the seed."""
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS, fault=lose("train", 2, 1))
    asked = [e for e in done.grid.exchanges if e.request.metadata.message_type == "train.unmask"]
    for attempt in (1, 2, 3):
        views = [given_by(e) for e in asked if e.attempt == attempt]
        assert len(views) == (3 if attempt == 2 else 4)
        assert all(view == views[0] for view in views)
        assert Counter(views[0].values())["key"] == (1 if attempt == 2 else 0)


# --- too few ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_with_too_few_clients_left_nothing_moves_and_the_run_goes_on(tiny, stage):
    config = tiny(**open_run(CLIENTS) | ON | {"min-replies": 3})
    done = run(config, CLIENTS, fault=lose(stage, 2, 0, 3))
    assert [row["aggregated"] for row in done.rows] == [True, False, True]
    assert [row["round"] for row in done.rows] == [1, 2, 2]
    assert [row["phase"] for row in done.rows] == ["B", "A", "A"]
    assert any("did not answer in time" in reason for reason in done.rows[1]["dropped"])
    if done.grid.trained(2):
        before, after = (done.grid.trained(i)[0].start for i in (2, 3))
        assert same_bits(before, after)
    messages = Counter(
        e.request.metadata.message_type for e in done.grid.exchanges if e.attempt == 2
    )
    left = {"train.advertise": 4, "train.share": 0, "train": 0, "train.unmask": 0}
    for earlier, later in pairwise(STAGES):
        if earlier != stage and left[earlier]:
            left[later] = left[earlier]
        if earlier == stage:
            break
    assert {kind: messages[kind] for kind in STAGES} == left
    books = by_dataset(ledger_entries())
    trained = 3 if stage in ("train", "train.unmask") else 2
    assert [len(book) for book in books.values()] == [trained] * CLIENTS


def test_an_attempt_that_never_trained_costs_no_epsilon(tiny):
    """Keys were lost, and nobody was asked to train: the largest epsilon is still the first's."""
    config = tiny(**sized(CLIENTS) | ON)
    done = run(config, CLIENTS, fault=lose("train.share", 2, 0, 1, 2))
    spent = [row["epsilon_max"] for row in done.rows]
    assert spent[0] == spent[1] < spent[2] <= config.privacy.epsilon


# --- a server that lies, a client that does ---------------------------------------------------


class Table:
    """Four real clients, driven stage by stage by whoever holds the messages."""

    def __init__(self, config):
        self.grid = FakeGrid(config, CLIENTS)
        self.config = config
        self.nodes = {p: node for node, p in self.grid.partitions.items()}
        self.keys: dict = {}
        self.shares: dict = {}

    def ask(self, client, stage, content, attempt=1):
        order = ConfigRecord({"run": "run-1", "attempt": attempt} | content)
        message = Message(
            RecordDict({SECAGG: order}), dst_node_id=self.nodes[client], message_type=stage
        )
        return self.send(message)

    def send(self, message):
        (identifier,) = self.grid.push_messages([message])
        (reply,) = self.grid.pull_messages([identifier])
        return reply.content

    def advertise(self):
        for client in range(CLIENTS):
            said = self.ask(client, "train.advertise", {"client": client})[SECAGG]
            self.keys[client] = said["mask-key"], said["cipher-key"]

    def directory(self, **changes):
        found = {c: k for c, k in self.keys.items()} | changes.get("keys", {})
        one, two = ({c: pair[i] for c, pair in found.items()} for i in (0, 1))
        return columns("mask-keys", one) | columns("cipher-keys", two)

    def share(self):
        for client in range(CLIENTS):
            reply = self.ask(client, "train.share", self.directory())
            self.shares[client] = mapping_of(reply[SECAGG], "shares")

    def train(self, client, sources=None, attempt=1):
        start = backbone.build(self.config)[1]
        sources = range(CLIENTS) if sources is None else sources
        sealed = {s: self.shares[s][client] for s in sources if s != client} if self.shares else {}
        order = messages.TrainRequest("run-1", 1, attempt, 2, {"A": 0, "B": 0}).record()
        records = {
            messages.ARRAYS: tensors.to_record(start),
            messages.CONFIG: order,
            messages.RUN_CONFIG: messages.run_config(flatten(self.config)),
            SECAGG: ConfigRecord(columns("shares", sealed)),
        }
        message = Message(RecordDict(records), dst_node_id=self.nodes[client], message_type="train")
        return self.send(message)

    def unmask(self, client, arrived, lost=(), attempt=1):
        both = {"arrived": list(arrived), "lost": list(lost)}
        return self.ask(client, "train.unmask", both, attempt)


@pytest.fixture
def table(tiny):
    return Table(tiny(**open_run(CLIENTS) | ON))


def refused(content, key="stage"):
    said = dict(content["config"]) if set(content) == {"config"} else {}
    return said == {"refusal": key}


def test_stages_out_of_order_are_refused_and_spend_nothing(table):
    everyone = range(CLIENTS)
    assert refused(table.train(0))
    assert refused(table.unmask(0, everyone))
    assert refused(table.ask(0, "train.share", columns("mask-keys", {})))
    table.advertise()
    assert refused(table.train(0))
    assert refused(table.unmask(0, everyone))
    table.share()
    assert refused(table.unmask(0, everyone))
    assert refused(table.ask(0, "train.share", table.directory()))
    assert refused(table.train(0, attempt=2))
    assert ledger_entries() == []
    assert MASKED in table.train(0)["arrays"]
    assert len(ledger_entries()) == 1
    assert refused(table.train(0))  # a second vector under the same masks
    assert refused(table.unmask(0, everyone, attempt=2))
    assert len(ledger_entries()) == 1
    table.train(1)
    assert not refused(table.unmask(1, everyone))
    assert refused(table.unmask(1, [0, 1, 2], [3]))  # the other secret of client 3


@pytest.mark.parametrize(
    ("arrived", "lost"),
    [
        ([0, 1, 2, 3], [3]),  # both secrets of client 3
        ([0, 1], [2, 3]),  # below the threshold
        ([0, 1, 2], []),  # one is left out, and may be asked for elsewhere
        ([1, 2, 3], [0]),  # the own vector was sent
        ([0, 1, 2, 3, 4], []),
        ([0, 0, 1, 2, 3], []),
    ],
)
def test_nobody_helps_to_open_one_vector(table, arrived, lost):
    table.advertise()
    table.share()
    table.train(0)
    answer = table.unmask(0, arrived, lost)
    assert SECAGG not in answer
    assert refused(answer) or refused(answer, "request")
    assert refused(table.unmask(0, [0, 1, 2, 3]))  # there is no second try
    (state,) = (c.state for n, c in table.grid.contexts.items() if n == table.nodes[0])
    assert not state[SECAGG]["seed_shares"]
    assert not state[SECAGG]["key_shares"]


@pytest.mark.parametrize("change", ["own", "twice", "alone", "foreign", "junk"])
def test_a_directory_that_lies_is_refused_before_any_share(table, change):
    table.advertise()
    own, other = table.keys[0], table.keys[1]
    match change:
        case "own":
            table.keys[0] = tuple(masks.public_key_of(masks.new_private_key()) for _ in range(2))
        case "twice":
            table.keys[2] = other
        case "alone":
            table.keys = {0: own}
        case "foreign":
            del table.keys[0]
        case "junk":
            table.keys[1] = (b"junk", b"more junk")
    answer = table.ask(0, "train.share", table.directory())
    assert refused(answer) or refused(answer, "request")
    assert refused(table.train(0)), "an attempt that went wrong trains nobody"


def test_shares_of_too_few_or_of_another_pair_are_refused_before_training(table):
    table.advertise()
    table.share()
    assert refused(table.train(0, sources=[0, 1]))
    table.shares[1][2], table.shares[1][3] = table.shares[1][3], table.shares[1][2]
    assert refused(table.train(2))
    table.shares[0][3] = b"junk"
    assert refused(table.train(3))
    assert ledger_entries() == []


def test_a_new_attempt_forgets_the_one_before(table):
    table.advertise()
    table.share()
    table.train(0)
    table.ask(0, "train.advertise", {"client": 0}, attempt=2)
    assert refused(table.unmask(0, range(CLIENTS)))
    assert refused(table.unmask(0, range(CLIENTS), attempt=2))


@pytest.mark.parametrize("harm", [np.nan, np.inf, 100.0])
def test_an_update_that_the_sum_cannot_hold_is_refused_by_its_client(tiny, monkeypatch, harm):
    honest, calls = local_round.run_round, []

    def harmed(model, data, start, drift, **options):
        result = honest(model, data, start, drift, **options)
        calls.append(options["local"].t)
        if len(calls) == 6:  # the second client of the second attempt
            name = min(active_names(result, METHODS["la-lora"].sent(2, last=False)))
            result[name] = result[name].copy()
            result[name].flat[0] = harm
        return result

    monkeypatch.setattr(local_round, "run_round", harmed)
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS)
    assert [row["replies"] for row in done.rows] == [4, 3, 4]
    assert done.rows[1]["dropped"] == [f"refused: {REFUSALS['update']}"]
    assert all(np.isfinite(array).all() for array in done.adapter.values())
    # What it drew has been counted all the same.
    assert [len(book) for book in by_dataset(ledger_entries()).values()] == [3] * CLIENTS


def changed(attempt, stage, change):
    """Change the record of one client's reply at one stage of one attempt."""

    def fault(now, partition, reply):
        if (now, reply.metadata.message_type, partition) == (attempt, stage, 1):
            reply.content[SECAGG] = ConfigRecord(change(dict(reply.content[SECAGG])))
        return reply

    return fault


def forged(record):
    return record | {"shares": [share[:4] + share[:3:-1] for share in record["shares"]]}


def foreign_key(record):
    return record | {"mask-key": masks.public_key_of(masks.new_private_key())}


def without_shares(record):
    return {name: value for name, value in record.items() if name != "shares"}


@pytest.mark.parametrize(
    ("stage", "change", "works"),
    [
        ("train.unmask", forged, False),  # no wrong sum: the client committed to its seed
        ("train.unmask", without_shares, True),  # three others have helped
        ("train.share", without_shares, True),
        ("train.advertise", foreign_key, True),  # it refuses the directory, and is left behind
        ("train.advertise", lambda record: {}, True),
    ],
)
def test_a_bad_reply_at_a_stage_is_dropped_or_fails_the_attempt(tiny, stage, change, works):
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS, fault=changed(2, stage, change))
    assert [row["aggregated"] for row in done.rows] == [True, works, True]
    assert done.rows[1]["dropped"]


# --- resumes and laws -------------------------------------------------------------------------


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny, tmp_path, monkeypatch):
    changes = ON | {
        "method": "la-lora",
        "privacy.noise": "seeded",
        "num-server-rounds": 4,
        "train.batch-size": 6,
    }
    whole = run(fresh(tiny, tmp_path, monkeypatch, "whole", **changes), CLIENTS)
    config = fresh(tiny, tmp_path, monkeypatch, "halves", **changes)
    first, later = interrupted(config, CLIENTS, before=crash_before(3))
    second = run(later, CLIENTS)
    assert second.folder.path == first.folder.path
    assert same_bits(second.adapter, whole.adapter)
    assert [row["aggregated"] for row in second.rows] == [True] * 4


def test_a_restarted_supernode_is_left_behind_and_comes_back(tiny):
    """Its keys were in memory only: it refuses, and takes part again in the next attempt."""
    grid = None

    def fault(attempt, partition, reply):
        if (attempt, partition, reply.metadata.message_type) == (2, 1, "train.share"):
            (node,) = (n for n, p in grid.partitions.items() if p == partition)
            old = grid.contexts[node]
            grid.contexts[node] = Context(
                old.run_id, old.node_id, old.node_config, RecordDict(), old.run_config
            )
        return reply

    config = tiny(**open_run(CLIENTS) | ON)
    grid = FakeGrid(config, CLIENTS, fault=fault)
    server_app.run(grid, config)
    rows = app_runs.run_folder(config).history()
    assert [row["replies"] for row in rows] == [4, 3, 4]
    assert rows[1]["dropped"] == [f"refused: {REFUSALS['stage']}"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "flora"}, ['secure-aggregation="secagg+"', "flora", "each client's factors"]),
        ({"robust": "median"}, ['robust="median"', '"none"', "only their sum"]),
        ({"weighting": "public-size"}, ['weighting="public-size"', '"uniform"', "plain sum"]),
        ({"min-replies": 1}, ["min-replies=1", "at least 2", "is that upload"]),
        ({"lora.ranks": "1,2"}, ['lora.ranks="1,2"', '"none"']),
    ],
)
def test_what_a_sum_is_not_enough_for_is_refused_before_the_run(tiny, changes, words):
    config = tiny(**ON | changes)
    grid = FakeGrid(config, 2)
    with pytest.raises(ConfigError) as caught:
        server_app.run(grid, config)
    assert all(word in str(caught.value) for word in words), caught.value
    assert grid.exchanges == []


def test_every_linear_method_may_run_and_no_other(tiny):
    for name, method in METHODS.items():
        build = partial(tiny, method=name)
        if method.linear:
            assert method_of(build(**ON)) is method
        else:
            with pytest.raises(ConfigError, match=name):
                method_of(build(**ON))


# --- through the real Flower ------------------------------------------------------------------


@pytest.mark.slow
def test_a_simulated_run_keeps_its_keys_between_messages(tiny, tmp_path):
    """Ray's actors keep nothing; what a stage leaves for the next is in Flower's context."""
    config = tiny(**ON | {"num-server-rounds": 2})
    assert run_toml(config, tmp_path) == 0
    (summary,) = summaries(config)
    assert summary["status"] == "completed"
    assert summary["epsilon_max"] <= config.privacy.epsilon
    for row in app_runs.run_folder(config).history():
        assert (row["replies"], row["dropped"], row["update_cosine"]) == (2, [], None)
