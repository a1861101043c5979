"""The commands of Flower: answers that cannot be understood end the run with one line."""

import itertools
import json

import pytest

from conftest import ROOT
from lalora_app.cli import main
from lalora_app.simulation import flower_commands, flower_engine
from lalora_app.simulation.flower_commands import FlowerError, follow, start_run
from lalora_app.simulation.run_log import Kind, read_line

STATUS_SECONDS = flower_commands._STATUS_SECONDS


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """Replace the flwr command by a script; give it the answers of run, log and list."""

    def answers(run='{"success": true, "run-id": "7"}', log="", status=None, code=0):
        (tmp_path / "run").write_text(f"Successfully started run 7\n{run}\n", "utf-8")
        (tmp_path / "log").write_text(log, "utf-8")
        (tmp_path / "list").write_text(f"Displaying information\n{json.dumps(status)}", "utf-8")
        script = tmp_path / "flwr"
        text = f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\ncat {tmp_path}/$1\nexit {code}\n'
        script.write_text(text, "utf-8")
        script.chmod(0o755)
        monkeypatch.setattr(flower_commands, "_FLWR", str(script))
        return tmp_path

    return answers


@pytest.fixture
def clock(monkeypatch):
    """Let every sleep take no time, and the clock advance by it."""
    now = [0.0]
    monkeypatch.setattr(flower_commands.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        flower_commands.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    return now


def listed(status, **more):
    return {"success": True, "runs": [{"run-id": "7", "status": status, **more}]}


def test_the_log_is_passed_on_line_by_line_and_the_details_are_flower_s(flwr):
    status = listed("finished:failed", **{"status-details": "no Ray"})
    folder, lines = flwr(log="a\nb\u2514 \n", status=status), []
    assert start_run([], {}, folder) == "7"
    assert follow("7", {}, folder, lines.append) == ("failed", "no Ray")
    assert lines == ["a\n", "b\u2514 \n"]


def test_an_unknown_status_is_named_and_not_waited_for(flwr, clock):
    folder = flwr(status=listed("paused"))
    law = "status='paused' must be one of pending, starting, running, finished:"
    with pytest.raises(FlowerError, match=law):
        follow("7", {}, folder, print)
    assert clock[0] == 0


@pytest.mark.parametrize("status", ["pending", "starting", "running"])
def test_the_wait_after_the_end_of_the_log_is_bounded(flwr, clock, monkeypatch, status):
    asked = itertools.count()
    monkeypatch.setattr(flower_commands, "_status", lambda *args: (next(asked), (status, ""))[1])
    with pytest.raises(FlowerError, match=f"120 s later its status is still '{status}'"):
        follow("7", {}, flwr(), print)
    assert clock[0] == pytest.approx(STATUS_SECONDS, abs=1)
    assert 100 < next(asked) < 130


def test_a_run_that_finishes_soon_after_its_log_is_waited_for(flwr, clock, monkeypatch):
    words = iter(["running", "running", "finished:completed"])
    monkeypatch.setattr(flower_commands, "_status", lambda *args: (next(words), ""))
    assert follow("7", {}, flwr(), print) == ("completed", "")


def test_a_run_goes_on_after_its_log_has_broken_off(flwr, clock, monkeypatch):
    words = iter(["running"] * 500 + ["finished:completed"])
    monkeypatch.setattr(flower_commands, "_status", lambda *args: (next(words), ""))
    lines = []
    assert follow("7", {}, flwr(log="a\n", code=1), lines.append) == ("completed", "")
    assert clock[0] > 3 * STATUS_SECONDS
    shown = read_line(lines[-1])
    assert shown.kind is Kind.WARNING
    assert "exit code 1" in shown.text


BAD_LISTS = {
    "no run": {"success": True, "runs": []},
    "no runs": {"success": False},
    "no status": {"success": True, "runs": [{"run-id": "7"}]},
    "no object": [1],
}


@pytest.mark.parametrize("case", list(BAD_LISTS))
def test_an_answer_without_a_status_is_one_line(flwr, case):
    with pytest.raises(FlowerError) as caught:
        follow("7", {}, flwr(status=BAD_LISTS[case]), print)
    assert "flwr list must" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failing_command_is_its_last_line(flwr):
    with pytest.raises(FlowerError, match=r"^flwr run: no such federation$"):
        start_run([], {}, flwr(run="Traceback:\n\nno such federation\n", code=3))


SLOW = "Failed to start local SuperLink within 15s. See logs at /tmp/x.log."


@pytest.mark.parametrize(("message", "starts"), [(SLOW, 3), ("Error: no such app", 1)])
def test_only_a_superlink_that_starts_too_slowly_is_started_again(flwr, message, starts):
    folder = flwr(run=json.dumps({"success": False, "error-message": f"Loading\n{message}\n"}))
    with pytest.raises(FlowerError) as caught:
        start_run([], {}, folder)
    assert str(caught.value) == f"flwr run: {message}"
    assert (folder / "calls").read_text("utf-8").split() == ["run"] * starts


def test_an_error_of_flower_is_one_line_and_exit_code_1(flwr, monkeypatch, capsys):
    flwr(status=listed("paused"))
    monkeypatch.setattr(flower_engine, "_stop", lambda home: None)
    assert main.main(["run", str(ROOT), "--engine", "flower"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lalora: flwr list: status='paused' must be")
