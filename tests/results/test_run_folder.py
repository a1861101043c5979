"""A run's folder after a power cut: damaged checkpoints, a half-written history, odd numbers."""

import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_app.adapter import atomic_files
from lalora_app.adapter.atomic_files import replace_atomically
from lalora_app.results import strict_json
from lalora_app.results.run_folder import RunFolder
from lalora_app.server_state.state import ServerState
from lalora_app.settings.errors import ConfigError


def state_after(attempts: int) -> ServerState:
    adapter = {"a": np.full((2, 50), attempts, np.float32), "b": np.zeros((3, 1), np.float32)}
    drift = {"base": np.full((4,), 0.5 * attempts, np.float32)}
    return ServerState(adapter, attempts - 1, {"A": 1, "B": attempts}, attempts, drift)


def row_of(attempt: int) -> dict:
    return {"attempt": attempt, "epsilon_max": attempt / 10, "aggregated": True}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A folder after three attempts."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for attempts in (1, 2, 3):
        folder.write_history([row_of(i) for i in range(1, attempts + 1)])
        folder.checkpoint(state_after(attempts))
    return folder


def checkpoint_files(run: RunFolder) -> list[Path]:
    return sorted((run.path / "checkpoints").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_the_tensors(path: Path) -> None:
    """The header reached the disk and the last block did not."""
    data = path.read_bytes()
    path.write_bytes(data[:-300] + bytes(300))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = [truncate, fill_with_zeros, zero_the_tensors, empty]


def assert_state(found: ServerState, attempts: int) -> None:
    expected = state_after(attempts)
    assert (found.attempts, found.round) == (expected.attempts, expected.round)
    assert found.versions == expected.versions
    for side in ("adapter", "drift"):
        ours, theirs = getattr(found, side), getattr(expected, side)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def warnings_in(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_the_two_newest_checkpoints_are_kept_and_no_other_file(run):
    names = [path.name for path in checkpoint_files(run)]
    assert names == ["attempt-00002.safetensors", "attempt-00003.safetensors"]
    assert_state(run.latest(), 3)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_older_one(run, damage, caplog):
    damage(checkpoint_files(run)[-1])
    assert_state(run.latest(), 2)
    (line,) = warnings_in(caplog)
    assert str(checkpoint_files(run)[-1]) in line
    assert "\n" not in line


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_whole_checkpoint_is_one_line(run, damage):
    for path in checkpoint_files(run):
        damage(path)
    for read in (run.latest, run.resume_point):
        with pytest.raises(ConfigError, match="must hold a checkpoint") as caught:
            read()
        assert str(run.path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_an_older_version_has_no_digest_and_is_read(run):
    from safetensors.numpy import save_file

    numbers = {"round": 4, "attempts": 4, "versions": {"A": 2, "B": 3}}
    path = run.path / "checkpoints" / "attempt-00004.safetensors"
    save_file({"a": np.ones(2, np.float32)}, path, metadata={"state": json.dumps(numbers)})
    assert (run.latest().attempts, run.latest().versions) == (4, {"A": 2, "B": 3})


def test_the_history_ends_where_the_used_checkpoint_does(run):
    truncate(checkpoint_files(run)[-1])
    point = run.resume_point()
    assert_state(point.state, 2)
    assert point.rows == [row_of(1), row_of(2)]
    assert point.epsilon_spent == 0.3  # the clients have spent it, though the attempt is repeated


def test_a_row_that_is_newer_than_every_checkpoint_is_dropped(run):
    run.write_history([row_of(i) for i in range(1, 5)])  # killed before checkpoint 4
    point = run.resume_point()
    assert (point.state.attempts, len(point.rows), point.epsilon_spent) == (3, 3, 0.4)


@pytest.mark.parametrize("cut", ['{"attempt": 3, "epsi', "", "\x00\x00\x00", "[1, 2]"])
def test_a_half_written_last_row_falls_back_to_the_checkpoint_before(run, cut, caplog):
    path = run.path / "history.jsonl"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], cut]), "utf-8")
    point = run.resume_point()
    assert_state(point.state, 2)
    assert point.rows == [row_of(1), row_of(2)]
    *damaged, unused = warnings_in(caplog)
    assert "attempt 3 is not used: the history has 2 whole rows" in unused
    assert [str(path) in line and "line 3" in line for line in damaged] == [True] * bool(cut)


def test_bytes_that_are_no_text_are_damage_too(run):
    path = run.path / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-10] + b"\xff\xfe\xff")
    assert run.resume_point().state.attempts == 2


def test_a_history_that_fits_no_checkpoint_is_one_line(run):
    path = run.path / "history.jsonl"
    path.write_text(json.dumps(row_of(1)) + "\n", "utf-8")
    with pytest.raises(ConfigError, match="must hold the history of its checkpoint") as caught:
        run.resume_point()
    assert "\n" not in str(caught.value)


def test_a_damaged_history_is_not_read_as_a_shorter_one(run):
    path = run.path / "history.jsonl"
    path.write_text(path.read_text("utf-8")[:-5], "utf-8")
    with pytest.raises(ConfigError, match=r"history\.jsonl: line 3 must be a JSON object"):
        run.history()


# --- durable replacement ----------------------------------------------------------------------


def test_a_file_and_its_folder_are_synced_around_the_replacement(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real_sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        events.append(("replace", target.name))
        return real_replace(path, target)

    monkeypatch.setattr(atomic_files.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    with replace_atomically(tmp_path / "new" / "file.txt") as new:
        new.write_text("content", "utf-8")
        events.append(("written", new.name))
    temporary = events[1][1]
    assert events == [
        ("sync", tmp_path.name),  # the name of the new folder
        ("written", temporary),
        ("sync", temporary),
        ("replace", "file.txt"),
        ("sync", "new"),
    ]


def test_run_files_and_checkpoints_are_written_through_the_durable_way(run, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic_files, "_sync", lambda path: synced.append(path.name))
    run.checkpoint(state_after(4))
    run.write_history([])
    run.write_json("summary.json", {})
    folders = [name for name in synced if not name.endswith(".tmp")]
    assert folders == ["checkpoints", "run", "run"]
    assert len(synced) == 6


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old", "utf-8")

    def write_half(path: Path) -> None:
        with replace_atomically(path) as new:
            new.write_text("half", "utf-8")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text("utf-8") == "old"


# --- numbers that JSON does not have ----------------------------------------------------------

TEXTS = st.text() | st.sampled_from(
    ["inf", "-inf", "nan", "~inf", "~~nan", "~", "\u2028", "\ud800"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def same(one, other) -> bool:
    """Equality with NaN equal to itself, and 1 different from 1.0 and True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return one == other


def refuse(constant: str):
    raise AssertionError(f"{constant} is not JSON")


@given(VALUES)
def test_every_nested_value_is_strict_json_and_read_back_as_it_was(value):
    text = strict_json.dumps(value)
    json.loads(text, parse_constant=refuse)
    assert same(strict_json.loads(text), value)


def test_files_of_a_run_are_strict_json_at_every_depth(run):
    odd = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.0, math.nan)}
    run.write_json("odd.json", odd)
    run.write_history([odd | row_of(1) | {"reason": "one\u2028row, \udcff"}])
    for name in ("odd.json", "history.jsonl"):
        text = (run.path / name).read_text("utf-8")
        found = json.loads(text, parse_constant=refuse)
        assert (found["a"], found["b"], found["d"]) == ("nan", ["inf", {"c": "-inf"}], [1.0, "nan"])
    (row,) = run.history()
    assert row["reason"] == "one\u2028row, \udcff"
    assert math.isnan(row["a"])
    assert row["b"] == [math.inf, {"c": -math.inf}]
