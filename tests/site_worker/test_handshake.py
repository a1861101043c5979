"""Who may use a site worker: nobody but this user, code and node config; all others are told."""

import os
import socket
import struct
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from helpers.fake_grid import identify
from lalora_app.settings.errors import ConfigError
from lalora_app.site_worker import hand_over, handshake, process
from lalora_app.site_worker.handshake import UnusableError
from lalora_app.wire.flower_bytes import context_from_bytes, records_to_bytes

NOBODY = 65534
OWN, THEIRS = RecordDict({"config": ConfigRecord({"from": "own"})}), "from the worker"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def node(folder):
    return {"state-path": str(folder), "worker": True, "partition-id": 0}


@pytest.fixture
def no_start(monkeypatch):
    """Starting a site worker fails at once."""
    begun = []

    def start(*args):
        begun.append(args)
        return SimpleNamespace(poll=lambda: 7)

    monkeypatch.setattr(hand_over, "_start", start)
    return begun


def handed_over(node) -> tuple[RecordDict, Context]:
    """The content for a message of a site, and the context afterwards."""
    identify()
    message = Message(RecordDict(), dst_node_id=7, message_type="train")
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(1, 7, dict(node), RecordDict(), {})
    return hand_over.by_site_worker("train", lambda *_: OWN)(message, context), context


def is_own(node, caplog, *words) -> bool:
    """Whether the message was answered by its own process, with one line that has the words."""
    content, _ = handed_over(node)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("LaLoRA client: the site worker is not used: ")
    assert all(word in line for word in words), line
    return content is OWN


@contextmanager
def listening(folder, answer):
    """A thread at the site worker's place, which gives every caller's connection to ``answer``."""
    listener = process.listen(folder)

    def serve():
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            with handshake.as_connection(accepted) as connection:
                answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def ready(connection) -> None:
    connection.recv_bytes()
    connection.send_bytes(handshake.READY)


def test_without_the_key_no_site_worker_is_asked(node, no_start, caplog):
    del node["worker"]
    assert handed_over(node)[0] is OWN
    assert (no_start, caplog.records) == ([], [])


@pytest.mark.parametrize(
    "wrong",
    [{"worker": "true"}, {"worker": 1}]
    + [{"worker": True, "worker-idle": idle} for idle in (0, -1.0, "ten", True, float("nan"))]
    + [{"worker-idle": 5}],
)
def test_a_key_that_breaks_its_law_is_named(wrong):
    with pytest.raises(ConfigError, match=r"^node config worker") as caught:
        handshake.idle_seconds(wrong)
    assert repr(list(wrong.values())[-1]) in str(caught.value)


def test_the_idle_time_is_in_minutes():
    assert handshake.idle_seconds({"worker": True, "worker-idle": 0.5}) == 30
    assert handshake.idle_seconds({"worker": True}) == 60 * handshake.IDLE_MINUTES


def test_a_new_state_folder_is_private(tmp_path):
    made = handshake.private_folder(tmp_path / "new")
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770])
def test_a_folder_that_others_may_enter_is_not_used(mode, node, folder, no_start, caplog):
    folder.chmod(mode)
    assert is_own(node, caplog, str(folder), f"{mode:o}", "700")
    assert no_start == []


def test_a_path_that_is_too_long_is_not_used(node, tmp_path, no_start, caplog):
    node["state-path"] = str(tmp_path / ("x" * 108))
    assert is_own(node, caplog, "107" if os.name == "posix" else "", "worker.sock")
    assert no_start == []


def test_the_longest_path_is_used(tmp_path):
    short = handshake._LONGEST - len(os.fsencode(tmp_path)) - len("/worker.sock") - 1
    folder = tmp_path / ("x" * short)
    folder.mkdir(mode=0o700)
    process.listen(folder).close()
    with pytest.raises(UnusableError, match="bytes"):
        process.listen(tmp_path / ("x" * (short + 1)))


def test_a_system_without_unix_sockets_is_told(node, no_start, caplog, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    assert is_own(node, caplog, "Unix sockets")


@pytest.mark.parametrize("kind", ["link to a socket", "link to nothing", "file"])
def test_a_file_that_is_no_socket_is_neither_used_nor_removed(
    kind, node, folder, tmp_path, no_start, caplog
):
    path, other = folder / "worker.sock", tmp_path / "other"
    other.mkdir()
    with process.listen(other):
        if kind == "file":
            path.touch()
        else:
            path.symlink_to(other / ("worker.sock" if kind == "link to a socket" else "none"))
        assert is_own(node, caplog, "worker.sock", "no socket")
    with pytest.raises(UnusableError):
        process.listen(folder)
    assert path.is_symlink() or path.is_file()
    assert no_start == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["folder", "socket"])
def test_another_users_folder_or_socket_is_not_used(what, node, folder, no_start, caplog):
    with listening(folder, lambda connection: pytest.fail("it was asked")):
        os.chown(folder if what == "folder" else folder / "worker.sock", NOBODY, NOBODY)
        assert is_own(node, caplog, "another user")
    assert no_start == []


def test_a_socket_that_says_another_owner_is_not_used(node, folder, no_start, caplog, monkeypatch):
    """As the test before, for a user who is not root."""
    found = SimpleNamespace(st_mode=0o140600, st_uid=os.geteuid() + 1)
    monkeypatch.setattr(type(folder), "lstat", lambda path: found)
    assert is_own(node, caplog, "worker.sock", "another user")


def peer(user: int):
    return SimpleNamespace(getsockopt=lambda *_: struct.pack("3i", 1, user, 1))


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="the system does not tell the peer")
def test_the_process_at_the_other_end_must_be_this_users():
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        handshake.require_own_peer(one)
    with pytest.raises(UnusableError, match="user"):
        handshake.require_own_peer(peer(os.geteuid() + 1))


@pytest.mark.parametrize("side", ["caller", "site worker"])
def test_each_side_asks_for_the_other_sides_user(side, node, folder, no_start, caplog, monkeypatch):
    def refuse(connected):
        raise UnusableError("the process at the other end belongs to the user 1")

    monkeypatch.setattr(handshake, "require_own_peer", refuse)
    if side == "caller":
        with listening(folder, lambda connection: None):
            assert is_own(node, caplog, "other end")
        return
    monkeypatch.setattr(process, "serve_caller", lambda *_: pytest.fail("it was served"))
    one, other = socket.socketpair(socket.AF_UNIX)
    assert process._serve_accepted(one, b"same")
    with other:
        assert other.recv(1) == b""


def test_a_site_worker_with_another_identity_is_not_used(node, folder, no_start, caplog):
    def other(connection):
        connection.recv_bytes()
        connection.send_bytes(handshake.OTHER)

    with listening(folder, other):
        assert is_own(node, caplog, "other code")
    assert no_start == []


def test_a_caller_with_another_identity_is_refused_and_the_site_worker_ends(monkeypatch):
    monkeypatch.setattr(process, "_answer", lambda *_: pytest.fail("it was answered"))
    one, other = socket.socketpair(socket.AF_UNIX)
    worker, caller = handshake.as_connection(one), handshake.as_connection(other)
    caller.send_bytes(b"x" * 64)
    assert not process.serve_caller(worker, b"y" * 64)
    assert caller.recv_bytes() == handshake.OTHER


def test_the_identity_covers_code_config_folder_and_environment(node, monkeypatch, tmp_path):
    def found(**changes):
        return handshake.identity(node | changes)

    first = found()
    assert found() == first
    assert found(**{"max-epsilon": float("inf")}) != first
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LALORA_HOME", "HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "/other")
            assert found() != first
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/other")
        assert found() == first
        patch.setattr(handshake, "code_hash", lambda: "another")
        assert found() != first
    with monkeypatch.context() as patch:
        patch.setattr(handshake, "version", lambda name: "another")
        assert found() != first
    monkeypatch.chdir(tmp_path)
    assert found() != first


def test_the_message_goes_over_and_content_state_and_log_come_back(node, folder, caplog):
    def answer(connection):
        ready(connection)
        kind, _, data = (connection.recv_bytes() for _ in range(3))
        context = context_from_bytes(data)
        told = {"kind": kind.decode(), "node": context.node_id, **context.node_config}
        connection.send_bytes(handshake.LOG + b'[40, "row 7 has no text"]')
        connection.send_bytes(
            handshake.CONTENT + records_to_bytes(RecordDict({"told": ConfigRecord(told)}))
        )
        connection.send_bytes(records_to_bytes(RecordDict({"secagg": ConfigRecord({"stage": 1})})))

    with listening(folder, answer):
        content, context = handed_over(node)
    assert dict(content["told"]) == {"kind": "train", "node": 7, **node}
    assert dict(context.state["secagg"]) == {"stage": 1}
    ((level, text),) = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert (level, text) == ("ERROR", "row 7 has no text")


@pytest.mark.parametrize("parts", [0, 1, 2, 3])
def test_a_site_worker_that_dies_with_the_message_is_an_error_and_nothing_is_done_again(
    parts, node, folder, no_start
):
    """Its releases may be on the ledger: answering again would spend twice for one message."""

    def die(connection):
        ready(connection)
        for _ in range(parts):
            connection.recv_bytes()

    with listening(folder, die), pytest.raises(hand_over.WorkerLostError, match="ledger"):
        handed_over(node)
    assert no_start == []


def test_a_reply_without_its_state_is_an_error(node, folder, no_start):
    def die(connection):
        ready(connection)
        for _ in range(3):
            connection.recv_bytes()
        connection.send_bytes(handshake.CONTENT + records_to_bytes(OWN))

    with listening(folder, die), pytest.raises(hand_over.WorkerLostError):
        handed_over(node)


def test_a_site_worker_that_ends_before_its_turn_is_started_again(node, folder, no_start, caplog):
    with listening(folder, lambda connection: None):
        assert is_own(node, caplog, "exit code 7", "worker.log")
    assert len(no_start) == 1


def test_a_turn_that_does_not_come_is_told(node, folder, no_start, caplog, monkeypatch):
    monkeypatch.setattr(hand_over, "_TURN_SECONDS", 0.05)
    done = threading.Event()
    with listening(folder, lambda connection: done.wait(60)):
        assert is_own(node, caplog, "busy")
        done.set()
    assert no_start == []


def test_a_site_has_one_site_worker(folder):
    held = process._lock(folder)
    try:
        assert held is not None
        assert process._lock(folder) is None
    finally:
        os.close(held)
    again = process._lock(folder)
    assert again is not None
    os.close(again)


def test_the_socket_is_this_users_only_and_replaces_one_of_a_dead_process(folder):
    before = os.umask(0)
    try:
        process.listen(folder).close()  # its file stays
        with process.listen(folder):
            assert (folder / "worker.sock").stat().st_mode & 0o777 == 0o600
    finally:
        assert os.umask(before) == 0


def test_a_caller_that_sends_nothing_does_not_block_the_next_one(monkeypatch):
    monkeypatch.setattr(process, "_CALLER_SECONDS", 0.05)
    one, other = socket.socketpair(socket.AF_UNIX)
    with other:
        assert process.serve_caller(handshake.as_connection(one), b"x" * 64)
