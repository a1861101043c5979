"""The last reply of a client: the same request gets the same bytes, and any other gets none."""

import numpy as np
import pytest

from lalora_app.site_files import last_reply

UPLOAD = {"m.lora_B.weight": np.arange(6, dtype=np.float32).reshape(3, 2), "head": np.ones(2)}
REPLY = last_reply.SavedReply(UPLOAD, 400)


@pytest.fixture
def path(tmp_path):
    return last_reply.reply_file(tmp_path, "mail of 2026", "clinic")


def test_the_same_request_gets_the_same_bytes(path):
    last_reply.save_reply(path, "one", REPLY)
    again = last_reply.load_if_same_request(path, "one")
    upload, size = again.upload, again.num_examples
    assert {n: a.tobytes() for n, a in upload.items()} == {
        n: a.tobytes() for n, a in UPLOAD.items()
    }
    assert size == 400


def test_another_request_gets_none(path):
    assert last_reply.load_if_same_request(path, "one") is None
    last_reply.save_reply(path, "one", REPLY)
    assert last_reply.load_if_same_request(path, "two") is None


def test_only_the_last_reply_is_kept_and_no_other_file(path):
    last_reply.save_reply(path, "one", REPLY)
    last_reply.save_reply(path, "two", REPLY)
    assert last_reply.load_if_same_request(path, "one") is None
    assert last_reply.load_if_same_request(path, "two") is not None
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("harm", [b"", b"{", b"\xff" * 100])
def test_a_damaged_file_means_a_new_answer(path, harm):
    last_reply.save_reply(path, "one", REPLY)
    path.write_bytes(harm)
    assert last_reply.load_if_same_request(path, "one") is None


def test_every_dataset_and_client_has_its_own_file(tmp_path):
    names = [("a", "x"), ("b", "x"), ("../a", "x"), ("a", "y")]
    files = {last_reply.reply_file(tmp_path, *name) for name in names}
    assert len(files) == 4
    assert {file.parent for file in files} == {tmp_path / "replies"}
