"""The way down: what a client holds is left out, and nothing depends on it."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from helpers.app_runs import by_dataset, fresh, ledger_entries, open_run, run, same_bits
from lalora_app.adapter.factors import kind
from lalora_app.privacy.ledger import state_folder
from lalora_app.site_files.held_download import HeldError, completed, save_download
from lalora_app.wire import messages, tensors
from lalora_app.wire.downlink import DRIFT, LEFT_OUT, Downlink

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "classifier.weight"
NODE = 7


def adapter(a=0.0, b=0.0, head=0.0):
    shapes = {A: (2, 6, a), B: (5, 2, b), HEAD: (3, 5, head)}
    return {name: np.full((m, n), value, np.float32) for name, (m, n, value) in shapes.items()}


def like():
    return adapter()


def drift(rank=1, value=1.0):
    return {
        A: np.full((rank, 6), value, np.float32),
        B: np.full((5, rank), value, np.float32),
    }


def asked(server, now, moved=None, node=NODE):
    return RecordDict(server.records(node, now, moved or {}))


def names(content):
    return set(content[messages.ARRAYS])


def read(content):
    return messages.adapter_of(content, like()), messages.drift_of(content, like())


def same(one, other):
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_first_request_holds_everything_and_later_ones_what_has_changed(tmp_path):
    server, path = Downlink(), tmp_path / "held"
    first = asked(server, adapter())
    assert names(first) == {A, B, HEAD}
    assert not first[LEFT_OUT]
    save_download(path, *read(first))
    server.answered([NODE])
    second = asked(server, adapter(b=2, head=1))
    assert names(second) == {B, HEAD}
    assert server.bytes[NODE] == 4 * (10 + 15)
    same(read(completed(second, path))[0], adapter(b=2, head=1))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # A
            st.integers(0, 2),  # B
            st.integers(0, 2),  # head
            st.integers(0, 2),  # rank of the drift
            st.booleans(),  # the reply comes
            st.booleans(),  # the client could keep it
        ),
        max_size=12,
    )
)
def test_a_client_reads_what_the_server_has_or_refuses(tmp_path_factory, rounds):
    server, path = Downlink(), tmp_path_factory.mktemp("home") / "held"
    for a, b, head, rank, comes, kept in rounds:
        now, moved = adapter(a, b, head), drift(rank, b) if rank else {}
        content = asked(server, now, moved)
        try:
            got = read(completed(content, path))
        except HeldError:
            assert content[LEFT_OUT]
            continue
        same(got[0], now)
        same(got[1], moved)
        if kept:
            save_download(path, *got)
        if comes:
            server.answered([NODE])


def test_after_a_refusal_or_no_answer_everything_is_sent():
    server = Downlink()
    asked(server, adapter())
    server.answered([NODE])
    assert not names(asked(server, adapter()))  # held: nothing to send
    assert names(asked(server, adapter())) == {A, B, HEAD}  # and no reply came to that


def test_other_nodes_hold_nothing():
    server = Downlink()
    asked(server, adapter())
    server.answered([NODE])
    assert names(asked(server, adapter(), node=NODE + 1)) == {A, B, HEAD}


def test_a_drift_is_left_out_until_it_moves(tmp_path):
    server, path = Downlink(), tmp_path / "held"
    save_download(path, *read(asked(server, adapter(), drift(2))))
    server.answered([NODE])
    again = asked(server, adapter(), drift(2))
    assert not again[DRIFT]
    same(read(completed(again, path))[1], drift(2))
    server.answered([NODE])
    assert set(asked(server, adapter(), drift(2, 3.0))[DRIFT]) == {A, B}


@pytest.mark.parametrize("held", ["nothing", "other", "damaged", "other shape"])
def test_what_is_not_held_bit_for_bit_is_refused(tmp_path, held):
    server, path = Downlink(), tmp_path / "held"
    asked(server, adapter(1))
    server.answered([NODE])
    content = asked(server, adapter(1))
    match held:
        case "other":
            save_download(path, adapter(np.nextafter(np.float32(1), np.float32(2))), {})
        case "damaged":
            path.write_bytes(b"\xff" * 100)
        case "other shape":
            save_download(path, {A: np.ones((6, 2), np.float32)}, {})
    with pytest.raises(HeldError, match="was left out, and is not held"):
        completed(content, path)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=70), max_size=3))
def test_whatever_is_left_out_is_an_error_of_its_own_or_nothing(tmp_path_factory, said):
    path = tmp_path_factory.mktemp("home") / "held"
    save_download(path, adapter(), drift())
    content = RecordDict(
        {messages.ARRAYS: tensors.to_record(adapter()), LEFT_OUT: ConfigRecord(said)}
    )
    if not said:
        same(messages.adapter_of(completed(content, path), like()), adapter())
        return
    with pytest.raises(HeldError):
        completed(content, path)


# --- in a run ---------------------------------------------------------------------------------


def requested(done, attempt):
    return [e.request.content for e in done.grid.trained(attempt)]


@pytest.mark.parametrize("method", ["la-lora", "ffa-lora", "rac-lora"])
def test_a_run_that_leaves_out_ends_where_one_that_sends_all_does(
    tiny, tmp_path, monkeypatch, method
):
    keys = {"privacy.noise": "seeded", "privacy.epsilon": np.inf, "method": method}
    one = run(fresh(tiny, tmp_path, monkeypatch, "one", **keys))
    monkeypatch.setattr(Downlink, "answered", lambda self, nodes: None)
    two = run(fresh(tiny, tmp_path, monkeypatch, "two", **keys))
    assert any(content[LEFT_OUT] for content in requested(one, 2))
    assert not any(content[LEFT_OUT] for content in requested(two, 2))
    assert same_bits(one.adapter, two.adapter)
    rows = zip(one.rows, two.rows, strict=True)
    assert [r["download_bytes"] < s["download_bytes"] for r, s in rows] == [False, True, True]


def test_la_lora_is_sent_the_factor_that_has_moved_and_the_head(tiny):
    done = run(tiny(**open_run()))
    for attempt, moved in ((2, "B"), (3, "A")):  # round 1 sent B up, round 2 A
        for content in requested(done, attempt):
            assert {kind(name) for name in content[messages.ARRAYS]} == {moved, "head"}


def test_a_client_that_lost_what_it_held_refuses_at_no_cost_and_is_sent_everything(tiny):
    def lose(attempt):
        if attempt == 2:
            for path in (state_folder({}) / "downloads").iterdir():
                path.unlink()

    done = run(tiny(**open_run() | {"num-server-rounds": 4}), before=lose)
    assert [row["aggregated"] for row in done.rows] == [True, False, True, True]
    assert set(done.rows[1]["dropped"]) == {f"refused: {messages.REFUSALS['held']}"}
    assert all(not content[LEFT_OUT] for content in requested(done, 3))
    assert all(content[LEFT_OUT] for content in requested(done, 4))
    for book in by_dataset(ledger_entries()).values():
        assert len(book) == 3  # what was refused is not in it


def test_nothing_is_held_after_the_last_round(tiny):
    run(tiny(**open_run()))
    assert not list((state_folder({}) / "downloads").iterdir())
