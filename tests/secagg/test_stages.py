"""Test clients against a server that breaks the order of the protocol or lies in it."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from helpers.app_runs import ledger_entries, open_run
from helpers.fake_grid import FakeGrid
from helpers.secure_runs import CLIENTS, ON
from lalora_app.models import backbone
from lalora_app.secagg import masks
from lalora_app.secagg.messages import (
    KEYS_MESSAGE,
    MASKED,
    MOST_CLIENTS,
    SECAGG,
    columns,
    mapping_of,
)
from lalora_app.secagg.pipeline import Pipeline
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten
from lalora_app.wire import messages, tensors
from lalora_app.wire.same_model import MODEL, model_record

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


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
            RecordDict({stage: order}), dst_node_id=self.nodes[client], message_type=KEYS_MESSAGE
        )
        return self.send(message)[stage]

    def send(self, message):
        (identifier,) = self.grid.push_messages([message])
        (reply,) = self.grid.pull_messages([identifier])
        return reply.content

    def advertise(self, attempt=1):
        for client in range(CLIENTS):
            said = self.ask(client, "advertise", {"client": client}, attempt)
            self.keys[client] = said["mask-key"], said["cipher-key"]

    def directory(self, **changes):
        found = {c: k for c, k in self.keys.items()} | changes.get("keys", {})
        one, two = ({c: pair[i] for c, pair in found.items()} for i in (0, 1))
        return columns("mask-keys", one) | columns("cipher-keys", two)

    def share(self, attempt=1):
        for client in range(CLIENTS):
            reply = self.ask(client, "share", self.directory(), attempt)
            self.shares[client] = mapping_of(reply, "shares")

    def train(self, client, sources=None, attempt=1, also=None):
        model, start = backbone.build(self.config)
        sources = range(CLIENTS) if sources is None else sources
        sealed = {s: self.shares[s][client] for s in sources if s != client} if self.shares else {}
        order = messages.TrainRequest("run-1", 1, attempt, 2, 2, {"A": 0, "B": 0}).record()
        records = {
            messages.ARRAYS: tensors.to_record(start),
            messages.CONFIG: order,
            messages.RUN_CONFIG: messages.run_config(flatten(self.config)),
            MODEL: model_record(model.fingerprint),
            SECAGG: ConfigRecord(columns("shares", sealed)),
            **(also or {}),
        }
        message = Message(RecordDict(records), dst_node_id=self.nodes[client], message_type="train")
        return self.send(message)

    def unmask(self, client, arrived, lost=(), attempt=1):
        both = {"arrived": list(arrived), "lost": list(lost)}
        return self.ask(client, "unmask", both, attempt)


@pytest.fixture
def table(tiny):
    return Table(tiny(**open_run(CLIENTS) | ON))


def refused(content, key="stage"):
    said = content["config"] if set(content) == {"config"} else content
    return dict(said) == {"refusal": key}


def test_stages_out_of_order_are_refused_and_spend_nothing(table):
    everyone = range(CLIENTS)
    assert refused(table.train(0))
    assert refused(table.unmask(0, everyone))
    assert refused(table.ask(0, "share", columns("mask-keys", {})))
    table.advertise()
    assert refused(table.train(0))
    assert refused(table.unmask(0, everyone))
    table.share()
    assert refused(table.unmask(0, everyone))
    assert refused(table.ask(0, "share", table.directory()))
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
    assert "shares" not in answer
    assert refused(answer) or refused(answer, "request")
    assert refused(table.unmask(0, [0, 1, 2, 3]))  # there is no second try
    (state,) = (c.state for n, c in table.grid.contexts.items() if n == table.nodes[0])
    assert set(state) == {"secagg-trained"}


@pytest.mark.parametrize("change", ["own", "twice", "alone", "foreign", "junk", "mask", "cipher"])
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
        case "mask":  # used after training, when budget is spent
            table.keys[1] = (bytes(32), other[1])
        case "cipher":
            table.keys[1] = (other[0], bytes(32))
    answer = table.ask(0, "share", table.directory())
    assert refused(answer) or refused(answer, "request")
    assert refused(table.train(0)), "an attempt that went wrong trains nobody"


def new_pair():
    return masks.new_private_key(), masks.new_private_key()


def test_a_directory_of_too_many_clients_is_refused_before_any_share(table, monkeypatch):
    table.advertise()
    made_up = range(CLIENTS, MOST_CLIENTS + 1)
    table.keys |= {c: tuple(map(masks.public_key_of, new_pair())) for c in made_up}
    with monkeypatch.context() as patch:
        patch.setattr(masks, "split_into_shares", None)  # a call would be another refusal
        assert refused(table.ask(0, "share", table.directory()))
        del table.keys[MOST_CLIENTS]
        assert refused(table.ask(0, "share", table.directory()), "internal")


def test_a_server_with_too_many_clients_in_a_round_is_told_before_the_first_message():
    cohorts = [dict.fromkeys(range(size)) for size in (3, MOST_CLIENTS)]
    Pipeline("run", cohorts, 2, 1.0)
    with pytest.raises(ConfigError, match="at most 1000 clients in a round, and there are 1001"):
        Pipeline("run", [*cohorts, dict.fromkeys(range(MOST_CLIENTS + 1))], 2, 1.0)


def test_shares_of_too_few_or_of_another_pair_are_refused_before_training(table):
    table.advertise()
    table.share()
    assert refused(table.train(0, sources=[0, 1]))
    table.shares[1][2], table.shares[1][3] = table.shares[1][3], table.shares[1][2]
    assert refused(table.train(2))
    table.shares[0][3] = b"junk"
    assert refused(table.train(3))
    table.shares[9] = table.shares[0]
    assert refused(table.train(1, sources=[0, 2, 3, 9]))  # there is no client 9
    assert ledger_entries() == []


def test_clients_with_different_directories_refuse_to_train(table):
    """Client 3 is given a directory without client 2; the others have all four."""
    table.advertise()
    table.share()
    whole = table.shares
    table.advertise()
    fewer = {c: k for c, k in table.keys.items() if c != 2}
    one, two = ({c: pair[i] for c, pair in fewer.items()} for i in (0, 1))
    for client in range(CLIENTS):
        lied_to = columns("mask-keys", one) | columns("cipher-keys", two)
        reply = table.ask(client, "share", lied_to if client == 3 else table.directory())
        table.shares[client] = mapping_of(reply, "shares")
    assert whole is table.shares
    assert refused(table.train(0, sources=(0, 1, 3)))
    assert refused(table.train(3, sources=(0, 1, 3)))
    assert MASKED in table.train(1, sources=(0, 1, 2))["arrays"]


def test_an_attempt_that_began_to_train_never_begins_again(table):
    """Also if it has ended, and for an earlier attempt: a mask is used for one vector."""
    table.advertise(attempt=2)
    table.share(attempt=2)
    table.train(0, attempt=2)
    for attempt in (1, 2):
        assert refused(table.ask(0, "advertise", {"client": 0}, attempt))
    assert not refused(table.unmask(0, range(CLIENTS), attempt=2))
    assert refused(table.ask(0, "advertise", {"client": 0}, 2))
    assert refused(table.train(0, attempt=2))
    assert len(ledger_entries()) == 1
    assert not refused(table.ask(0, "advertise", {"client": 0}, 3))


def kept(table):
    (state,) = (c.state for n, c in table.grid.contexts.items() if n == table.nodes[0])
    return set(state)


def test_secrets_of_three_attempts_are_kept_and_of_one_run(table):
    """Attempts do not disturb each other: the shares of the first outlive keys of the next two."""
    table.advertise()
    table.share()
    first = dict(table.shares)
    for attempt in (2, 3):
        table.advertise(attempt)
    assert kept(table) == {"secagg-1", "secagg-2", "secagg-3"}
    table.share(attempt=3)
    assert table.shares != first
    table.shares = first
    assert MASKED in table.train(0)["arrays"]
    assert not refused(table.unmask(0, range(CLIENTS)))
    assert kept(table) == {"secagg-2", "secagg-3", "secagg-trained"}
    table.advertise(attempt=9)
    assert kept(table) == {"secagg-9", "secagg-trained"}
    order = ConfigRecord({"run": "run-2", "attempt": 10, "client": 0})
    message = Message(
        RecordDict({"advertise": order}), dst_node_id=table.nodes[0], message_type=KEYS_MESSAGE
    )
    table.send(message)
    assert kept(table) == {"secagg-10", "secagg-trained"}


def test_training_forgets_the_attempt_before(table):
    """Its vector was lost, or it would have been unmasked by now."""
    table.advertise()
    table.share()
    table.train(0)
    table.advertise(attempt=2)
    table.share(attempt=2)
    assert MASKED in table.train(0, attempt=2)["arrays"]
    assert refused(table.unmask(0, range(CLIENTS)))
    assert not refused(table.unmask(0, range(CLIENTS), attempt=2))


@pytest.mark.parametrize("junk", [{}, {"run": "run-1"}, {"run": "run-1", "attempt": ""}])
def test_a_stage_that_fails_changes_no_other_part_of_its_message(table, junk):
    table.advertise()
    table.share()
    records = {"share": ConfigRecord(junk), "advertise": ConfigRecord(junk)}
    content = table.train(0, also=records)
    assert MASKED in content["arrays"]
    assert "refusal" not in content["config"]
    assert all(dict(content[name]) == {"refusal": "request"} for name in records)
    order = {"run": "run-1", "attempt": 2, "client": 1}
    content = table.train(1, sources=[], also={"advertise": ConfigRecord(order)})
    assert dict(content["config"]) == {"refusal": "stage"}
    assert "mask-key" in content["advertise"]
