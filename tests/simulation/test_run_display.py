"""What `lalora run` prints: on a terminal, into a file, verbose, and of a failed run."""

import io
import re

import pytest
from rich.console import Console

from conftest import ROOT
from helpers.flower_log import ERROR, INFO, LOG, NOTES, RESULTS, ROUNDS, WARNINGS
from lalora_app.cli import main
from lalora_app.simulation import flower_engine
from lalora_app.simulation.run_display import RunDisplay

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
FAILED_ROUND = (
    "round 1/2  phase B  FAILED: too few valid replies  not evaluated  epsilon <= 2.10"
    "  18.5 s  ETA 0:21"
)


def shown(log, *, terminal, verbose=False, width=80):
    """Return what a display writes for a log."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    with RunDisplay(console, verbose=verbose) as display:
        for line in log.splitlines(keepends=True):
            display.show(line)
    return file.getvalue()


def test_a_file_gets_one_plain_line_per_round_and_the_results_last():
    out = shown(LOG, terminal=False)
    warned = [f"warning: {text}" for text in WARNINGS]
    expected = [warned[0], NOTES[0], warned[1], NOTES[1], NOTES[2], *ROUNDS, "", *RESULTS]
    assert out.splitlines() == expected
    assert "\x1b" not in out


def test_a_terminal_gets_a_bar_with_accuracy_epsilon_and_eta_and_the_results_last():
    out = shown(LOG, terminal=True)
    assert "\x1b" in out
    plain = ANSI.sub("", out)
    last = plain.replace("\r", "\n").rstrip().splitlines()
    assert last[-5:] == ["", *RESULTS]
    bar = last[-6]
    assert bar.startswith("round 2/2")
    assert "━" * 20 in bar
    assert "accuracy 0.9316  epsilon <= 3.00" in bar
    assert len(bar) <= 80
    for text in (*NOTES[:2], *WARNINGS):
        assert text in plain
    for text in ROUNDS:
        assert text not in plain
    assert "Flower" not in plain


def test_the_bar_starts_before_the_first_round_and_counts_the_estimate_down():
    file, now = io.StringIO(), [100.0]
    console = Console(file=file, force_terminal=True, width=80)
    display = RunDisplay(console)
    progress = display._bar._progress
    progress.get_time = progress._tasks[0]._get_time = lambda: now[0]

    def bar():
        with console.capture() as capture:
            console.print(progress.get_renderable())
        return ANSI.sub("", capture.get())

    assert "starting" in bar()
    display.show(f"{INFO}LaLoRA {ROUNDS[0]}\n")
    assert "round 0/2" in bar()
    assert "ETA" not in bar()
    display.show(f"{INFO}LaLoRA {ROUNDS[1]}\n")
    assert "accuracy 0.9035  epsilon <= 2.10 ETA 0:21" in bar()
    now[0] += 5
    assert "ETA 0:16" in bar()
    now[0] += 60
    assert "ETA 0:00" in bar()


def test_a_failed_round_is_shown_on_a_terminal_too():
    assert FAILED_ROUND in ANSI.sub("", shown(f"{INFO}LaLoRA {FAILED_ROUND}\n", terminal=True))


@pytest.mark.parametrize("terminal", [False, True])
def test_verbose_shows_every_line_as_it_is(terminal):
    assert shown(LOG, terminal=terminal, verbose=True) == LOG


def test_long_lines_and_brackets_are_kept_as_they_are():
    text = "loading model [bold]m[/bold] and data " + "x" * 200
    assert shown(f"{INFO}LaLoRA {text}\n", terminal=False) == text + "\n"


def test_a_comparison_shows_the_results_of_each_run_before_the_next():
    second = f"{INFO}LaLoRA compare: run 2 of 2, b-eps1-seed0\n"
    lines = shown(LOG + second + LOG, terminal=False).splitlines()
    place = lines.index("compare: run 2 of 2, b-eps1-seed0")
    assert lines[place - 4 : place] == RESULTS
    assert lines[-4:] == RESULTS


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `lalora run` on a recorded log; return exit code, stdout and stderr."""

    def started(log, status, details="", options=()):
        def follow(run_id, env, cwd, show):
            for line in log.splitlines(keepends=True):
                show(line)
            return status, details

        monkeypatch.setattr(flower_engine, "start_run", lambda *args: "1")
        monkeypatch.setattr(flower_engine, "follow", follow)
        monkeypatch.setattr(flower_engine, "check_launch", lambda launch: None)
        code = main.main(["run", str(ROOT), "--engine", "flower", "--nodes", "3", *options])
        return code, *capsys.readouterr()

    return started


def test_a_run_says_first_that_the_simulation_starts_and_last_its_results(run):
    code, out, err = run(LOG, "completed")
    checks, first, *_ = lines = out.splitlines()
    assert (code, err) == (0, "")
    assert checks == "checking data, model and privacy budget"
    assert first == "starting Flower's simulation with 3 clients, 10 to 20 seconds"
    assert lines[-4:] == RESULTS
    assert "\x1b" not in out


def test_forced_colours_do_not_reach_a_file(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in run(LOG, "completed")[1]


def test_verbose_prints_flower_s_lines(run):
    assert LOG in run(LOG, "completed", options=["--verbose"])[1]


def test_a_failed_run_ends_with_its_reason_in_one_line(run):
    log = f"{INFO}Starting Flower Simulation\n{ERROR}LaLoRA: a=1 must be 2\nTraceback\n  x\n"
    code, out, err = run(log, "failed", "Flower's details")
    assert (code, err) == (1, "lalora: the run failed: a=1 must be 2\n")
    assert "Traceback" not in out


def test_a_failure_outside_of_the_app_shows_the_last_lines_of_flower(run):
    log = "".join(f"{INFO}line {i}\n" for i in range(100)) + "RuntimeError: no Ray\n"
    code, _, err = run(log, "failed", "exit code 1")
    *others, last = err.splitlines()
    assert code == 1
    assert last == "lalora: the run failed: exit code 1"
    assert others[-1] == "RuntimeError: no Ray"
    assert len(others) == 30
    assert "\x1b" not in err
