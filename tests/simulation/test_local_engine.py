"""`lalora run` in worker processes: results, exit codes, and no process left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import ROOT
from helpers.simulation_runs import run_toml, summaries
from lalora_app.cli import main
from lalora_app.results.run_folder import to_toml
from lalora_app.simulation.launch import read_launch
from lalora_app.simulation.local_process import BAD_INPUT, from_json, to_json

SHORT = {"num-server-rounds": 2}
LONG = {"num-server-rounds": 500, "privacy.epsilon": float("inf")}


def processes_of(home: Path) -> list[psutil.Process]:
    """The running processes whose LALORA_HOME is ``home``, without this one."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        ours = (process.info["environ"] or {}).get("LALORA_HOME") == str(home)
        if ours and process.pid != os.getpid() and process.info["status"] != "zombie":
            found.append(process)
    return found


def gone(home: Path, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not processes_of(home)


@pytest.mark.slow
def test_a_run_ends_with_results_and_leaves_no_process(tiny, tmp_path, capfd):
    config = tiny(**SHORT)
    assert run_toml(config, tmp_path, "local") == 0
    (summary,) = summaries(config)
    assert (summary["status"], summary["rounds"]) == ("completed", 2)
    assert summary["epsilon_max"] <= config.privacy.epsilon
    assert gone(tmp_path / "home")
    out, err = capfd.readouterr()
    assert err == ""
    assert "round 2/2" in out
    assert "2 clients in " in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"train.batch-size": 350}, [], "train.batch-size=350"),
        ({"min-clients": 3}, [], "--nodes 2"),
        ({}, ["--workers", "4000"], "--workers 4000 must be at most"),
    ],
)
def test_a_run_that_cannot_succeed_is_one_line(changes, options, told, tiny, tmp_path, capfd):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config := tiny(**SHORT | changes)), "utf-8")
    assert main.main(["run", str(ROOT), "--nodes", "2", "-c", str(file), *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lalora: ")
    assert told in line
    assert not Path(config.output).exists()
    assert not (tmp_path / "home" / "ledger.sqlite").exists()


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_is_one_line(tiny, tmp_path, capfd, monkeypatch):
    """The path of a Unix socket has at most about a hundred bytes."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    assert run_toml(tiny(**SHORT), tmp_path, "local") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"lalora: TMPDIR={folder} must be a folder that can hold the socket")


def test_an_engine_that_does_not_exist_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["run", str(ROOT), "--engine", "ray"])
    assert ended.value.code == BAD_INPUT
    assert "argument --engine: 'ray' must be one of local, flower" in capsys.readouterr().err


def test_workers_of_another_engine_are_told(capsys):
    assert main.main(["run", str(ROOT), "--engine", "flower", "--workers", "1"]) == 2
    told = "lalora: --workers 1 must be left out with --engine flower, which has no workers\n"
    assert capsys.readouterr().err == told


def test_the_server_process_reads_the_launch_as_it_was():
    launch = read_launch(ROOT, ['method="rolora" privacy.epsilon=inf'], 7)
    assert from_json(to_json(launch)) == launch


@contextlib.contextmanager
def started(config, folder: Path) -> Iterator[subprocess.Popen]:
    """A run by the command line, after its first round."""
    file = folder / "run.toml"
    file.write_text(to_toml(config), "utf-8")
    words = [sys.executable, "-m", "lalora_app.cli.main", "run", str(ROOT), "--nodes", "2"]
    with subprocess.Popen(
        [*words, "-c", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        lines = iter(process.stdout.readline, "")
        assert any("round 1/" in line for line in lines)
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_tells_how_to_go_on(end, tiny, tmp_path):
    with started(config := tiny(**LONG), tmp_path) as process:
        process.send_signal(end)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert gone(tmp_path / "home")
    (folder,) = Path(config.output).iterdir()
    assert f"to continue the run: lalora run {ROOT} -c 'resume-from=\"{folder}\"'" in rest
    assert json.loads((folder / "clients.json").read_text("utf-8")) == {"clients": 2}


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_all_its_processes_with_it(tiny, tmp_path):
    with started(tiny(**LONG), tmp_path) as process:
        process.kill()
    assert gone(tmp_path / "home")


@pytest.mark.slow
def test_a_server_process_that_is_killed_is_told_and_takes_its_workers_with_it(tiny, tmp_path):
    with started(tiny(**LONG), tmp_path) as process:
        (server,) = psutil.Process(process.pid).children()
        server.kill()
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "lalora: the run failed: its process was ended by signal 9" in rest
    assert gone(tmp_path / "home")
