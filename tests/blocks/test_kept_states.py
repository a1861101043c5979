"""Kept states: within their limit, for this user only, and never of something else or damaged."""

import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.blocks.kept_states import StatesInFile, StatesInMemory, room_for

NAME = hashlib.sha256(b"one").digest()
OTHER = hashlib.sha256(b"other").digest()
SIZES = [4, 8, 0, 6]
ENTRIES = [b"\x01" * 4, b"\x02" * 8, b"", b"\x03" * 6]
KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(4)]
HEADER, DIGEST = 32, 32


def filled(path, **options) -> StatesInFile:
    file = StatesInFile(path, NAME, SIZES, **options)
    for index, entry in enumerate(ENTRIES):
        file.write(index, KEYS[index], entry)
    return file


def read(file: StatesInFile) -> list[bytes | None]:
    return [file.read(index, key) for index, key in enumerate(KEYS)]


@settings(deadline=None)  # it opens files
@given(st.lists(st.binary(max_size=9), min_size=1, max_size=5), st.data())
def test_what_is_read_is_what_was_written(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("cache") / "x.states"
    file = StatesInFile(path, NAME, [len(entry) for entry in entries])
    written = data.draw(st.sets(st.integers(0, len(entries) - 1)))
    keys = [hashlib.sha256(bytes([i])).digest() for i in range(len(entries))]
    for index in written:
        file.write(index, keys[index], entries[index])
    for source in (file, StatesInFile(path, NAME, [len(entry) for entry in entries])):
        found = [source.read(index, key) for index, key in enumerate(keys)]
        assert found == [e if i in written else None for i, e in enumerate(entries)]


def test_the_file_is_this_users_alone(tmp_path):
    path = tmp_path / "new" / "x.states"
    filled(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_others_may_read_and_a_link_are_not_written(tmp_path):
    path = tmp_path / "x.states"
    path.write_bytes(b"")
    path.chmod(0o644)
    filled(path)
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "link.states").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        filled(tmp_path / "link.states")
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_a_kept_file_that_others_may_read_is_closed_to_them(tmp_path):
    path = tmp_path / "x.states"
    filled(path)
    path.chmod(0o644)
    assert read(StatesInFile(path, NAME, SIZES)) == ENTRIES
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_of_another_user_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "x.states"
    filled(path)
    whole, owner = path.read_bytes(), path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match="another user"):
        StatesInFile(path, OTHER, SIZES)
    assert path.read_bytes() == whole


def test_a_disk_that_cannot_be_read_gives_no_entry(tmp_path, monkeypatch):
    file = filled(tmp_path / "x.states")

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert read(file) == [None] * 4


def test_an_entry_of_another_key_or_place_is_not_read(tmp_path):
    file = filled(tmp_path / "x.states")
    assert read(file) == ENTRIES
    assert file.read(0, KEYS[1]) is None
    assert file.read(3, KEYS[0]) is None
    assert file.read(4, KEYS[0]) is None
    with pytest.raises(ValueError, match="example 0 must have 4 bytes"):
        file.write(0, KEYS[0], b"\x01" * 5)


def test_no_changed_byte_is_read(tmp_path):
    """Every byte of every place; the entry is then written anew."""
    path = tmp_path / "x.states"
    filled(path)
    whole = path.read_bytes()
    start = HEADER
    for index, size in enumerate(SIZES):
        for place in range(start, start + DIGEST + size):
            changed = bytearray(whole)
            changed[place] ^= 0x10
            path.write_bytes(changed)
            file = StatesInFile(path, NAME, SIZES)
            expected = [None if i == index else entry for i, entry in enumerate(ENTRIES)]
            assert read(file) == expected
        file.write(index, KEYS[index], ENTRIES[index])
        assert read(file) == ENTRIES
        start += DIGEST + size
    assert start == len(whole)


def test_a_cut_file_loses_what_is_cut(tmp_path):
    path = tmp_path / "x.states"
    file = filled(path)
    os.truncate(path, path.stat().st_size - 1)
    assert read(file) == [*ENTRIES[:3], None]
    os.truncate(path, HEADER + 3)
    assert read(file) == [None] * 4
    os.truncate(path, 5)
    assert read(StatesInFile(path, NAME, SIZES)) == [None] * 4


def test_a_file_of_another_name_is_emptied_and_says_so(tmp_path):
    path = tmp_path / "x.states"
    assert not filled(path).emptied
    assert not StatesInFile(path, NAME, SIZES).emptied
    other = StatesInFile(path, OTHER, SIZES)
    assert other.emptied
    assert read(other) == [None] * 4
    assert path.stat().st_size == HEADER


def test_the_file_keeps_its_limit(tmp_path):
    path, limit = tmp_path / "x.states", HEADER + 2 * DIGEST + 4 + 8
    for bound, kept in ((limit, 2), (limit - 1, 1), (HEADER, 0), (HEADER - 1, 0)):
        path.unlink(missing_ok=True)
        file = filled(path, limit=bound)
        assert read(file) == ENTRIES[:kept] + [None] * (4 - kept)
        assert path.stat().st_size <= max(bound, HEADER)


def test_a_full_disk_keeps_nothing_and_stops_nothing(tmp_path, monkeypatch):
    file = StatesInFile(tmp_path / "x.states", NAME, SIZES)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    file.write(0, KEYS[0], ENTRIES[0])
    assert file.read(0, KEYS[0]) is None


def test_the_memory_keeps_its_limit_and_what_was_used_last():
    memory = StatesInMemory(2 * DIGEST + 10)
    for key in KEYS[:2]:
        memory.write(0, key, b"12345")
    assert memory.read(0, KEYS[0]) == b"12345"
    memory.write(0, KEYS[2], b"1")
    assert [memory.read(0, key) for key in KEYS[:3]] == [b"12345", None, b"1"]
    memory.write(0, KEYS[3], b"1" * (DIGEST + 11))  # alone above the limit
    assert memory.read(0, KEYS[3]) is None
    memory.write(0, KEYS[0], b"12345")  # again
    assert memory.size_in_bytes() == 2 * DIGEST + 6


def test_room_is_that_of_the_file(tmp_path):
    for limit in range(HEADER - 1, HEADER + 4 * DIGEST + 19):
        path = tmp_path / f"{limit}.states"
        kept = [entry for entry in read(filled(path, limit=limit)) if entry is not None]
        assert room_for(SIZES, limit) == len(kept)
    assert room_for([], 0) == 0
