"""The command line: what it prints, its exit codes, and bad input before anything is started."""

import csv
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest
from flwr.common.config import parse_config_args

import helpers.shared_accounting  # noqa: F401
from conftest import ROOT
from lalora_app.cli import ledger_command, main
from lalora_app.methods.table import METHODS
from lalora_app.privacy import accounting
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.ledger import Ledger
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.overrides import absolute
from lalora_app.simulation import flower_engine, launch, start

NO_LIMIT = Limit(float("inf"), 1e-5)
RELEASE = Release(0.05, 2.0, 4)


def booked(ledger, dataset, run, round_, release=RELEASE):
    ledger.reserve(
        *(dataset, run, round_, release),
        planned=release.count,
        run_limit=NO_LIMIT,
        node_limit=NO_LIMIT,
    )


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Three lines: two rounds of one run and one of another, on one dataset."""
    monkeypatch.setenv("LALORA_HOME", str(tmp_path))
    book = Ledger(tmp_path / "ledger.sqlite")
    booked(book, "mail", "run-1", 1)
    booked(book, "mail", "run-1", 2)
    booked(book, "mail", "run-2", 1)
    return book


# --- ledger -----------------------------------------------------------------------------------


def test_show_composes_each_run_and_all_of_them(ledger, capsys):
    assert main.main(["ledger", "show"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{ledger.path}: 3 lines, delta 1e-05"
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row[:3] for row in cells] == [
        ["mail", "all runs", "12 releases"],
        ["mail", "run-1", "8 releases"],
        ["mail", "run-2", "4 releases"],
    ]
    for row, count in zip(cells, (12, 8, 4), strict=True):
        spent = accounting.epsilon([Release(0.05, 2.0, count)], 1e-5)
        assert row[3] == f"epsilon {spent:.3f}"
    assert 0 < float(cells[2][3].split()[1]) < float(cells[0][3].split()[1])


def test_show_can_be_asked_for_a_file_and_a_dataset(ledger, tmp_path, capsys):
    booked(ledger, "other", "run-1", 1)
    assert main.main(["ledger", "show", "--dataset", "other"]) == 0
    out = capsys.readouterr().out
    assert "other" in out
    assert "mail" not in out
    elsewhere = Ledger(tmp_path / "elsewhere.sqlite")
    assert main.main(["ledger", "show", "--path", str(elsewhere.path)]) == 0
    assert capsys.readouterr().out == f"{elsewhere.path}: 0 lines, delta 1e-05\n"


def test_a_release_without_noise_is_an_infinite_epsilon(ledger, capsys):
    booked(ledger, "open", "run-3", 1, Release(0.05, 0.0, 4))
    assert main.main(["ledger", "show", "--dataset", "open"]) == 0
    assert "epsilon inf" in capsys.readouterr().out
    assert main.main(["ledger", "verify", "--dataset", "open"]) == 0
    assert main.main(["ledger", "verify", "--dataset", "open", "--max-epsilon", "8"]) == 1


def test_two_accountants_agree_about_a_ledger(ledger, capsys):
    assert main.main(["ledger", "verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.endswith("agree")
        assert "DISAGREE" not in line
        words = line.split()
        prv, pld = (float(words[words.index(name) + 1]) for name in ("PRV", "PLD"))
        assert prv == pytest.approx(pld, rel=0.01, abs=0.004)


@pytest.mark.parametrize("factor", [0.9, 1.2])
def test_verify_fails_when_the_accountants_disagree(ledger, capsys, monkeypatch, factor):
    honest = ledger_command.second_epsilon
    monkeypatch.setattr(ledger_command, "second_epsilon", lambda *args: factor * honest(*args))
    assert main.main(["ledger", "verify", "--dataset", "mail"]) == 1
    assert capsys.readouterr().out.count("DISAGREE") == 3


def test_export_is_every_line_as_csv(ledger, capsys):
    assert main.main(["ledger", "export", "--path", str(ledger.path)]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    entries = ledger.entries()
    assert [line["uid"] for line in lines] == [entry.uid for entry in entries]
    for line, entry in zip(lines, entries, strict=True):
        assert float(line["noise_multiplier"]) == entry.release.noise_multiplier
        assert (line["dataset"], int(line["count"])) == (entry.dataset, entry.release.count)


def test_merge_says_which_lines_are_new(ledger, tmp_path, capsys):
    copy = tmp_path / "copy.sqlite"
    shutil.copy(ledger.path, copy)
    booked(Ledger(copy), "other", "run-9", 7)
    before = len(ledger.entries())
    command = ["ledger", "merge", "--path", str(ledger.path), str(copy)]
    assert main.main(command) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("other  |  run-9  |  round 7")
    assert last.endswith(f"1 of the {before + 1} lines of {copy} are new")
    assert main.main(command) == 0
    assert capsys.readouterr().out.startswith(f"{ledger.path}: 0 of")
    assert len(ledger.entries()) == before + 1


def test_verify_fails_on_a_damaged_file(ledger, capsys):
    data = bytearray(ledger.path.read_bytes())
    data[2 * 4096 + 2 : 3 * 4096] = bytes(4094)
    ledger.path.write_bytes(data)
    assert main.main(["ledger", "verify", "--path", str(ledger.path)]) == 2
    assert "must be" in capsys.readouterr().err


def test_policy_says_what_a_file_allows(tmp_path, capsys):
    path = tmp_path / "policy.toml"
    text = "max-epsilon = 8.0\ndelta = 1e-6\nmethods = ['la-lora']\n[datasets.a]\nmax-epsilon = 2.0"
    path.write_text(text)
    assert main.main(["policy", str(path), "--dataset", "a"]) == 0
    out = capsys.readouterr().out
    for line in (
        "epsilon up to 2 at delta 1e-06",
        "methods: la-lora\n",
        "models: all",
        "not be sent",
    ):
        assert line in out
    path.write_text("max-epsilon = 8.0")
    assert main.main(["policy", str(path)]) == 2
    assert "delta is missing" in capsys.readouterr().err


def test_verify_fails_above_a_maximal_epsilon(ledger, capsys):
    whole = accounting.epsilon([Release(0.05, 2.0, 12)], 1e-5)
    assert main.main(["ledger", "verify", "--max-epsilon", str(whole * 1.001)]) == 0
    assert "above" not in capsys.readouterr().out
    assert main.main(["ledger", "verify", "--max-epsilon", str(whole * 0.999)]) == 1
    out = capsys.readouterr().out
    assert out.count("above max-epsilon") == 1  # the runs alone are below it


def test_a_missing_ledger_is_one_line_and_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LALORA_HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / "ledger.sqlite"
    for action in ("show", "verify"):
        assert main.main(["ledger", action]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"lalora: ledger={path} must be an existing ledger: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert not path.parent.exists()


def test_a_file_that_is_no_ledger_is_one_line(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("no database " * 100, "utf-8")
    assert main.main(["ledger", "show", "--path", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--delta", "0"), ("--delta", "2"), ("--delta", "nan"), ("--max-epsilon", "nan")],
)
def test_a_bad_number_is_told(ledger, capsys, option, value):
    try:
        code = main.main(["ledger", "verify", option, value])
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    assert code == 2
    assert option in capsys.readouterr().err


def test_show_does_not_take_an_option_that_it_ignores(ledger):
    with pytest.raises(SystemExit):
        main.main(["ledger", "show", "--max-epsilon", "0.001"])


# --- methods ----------------------------------------------------------------------------------


def test_methods_lists_every_method(capsys):
    assert main.main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(METHODS)
    for name, line in lines.items():
        assert METHODS[name].paper in line
    assert lines["la-lora"].split()[1:8] == ["steps", "B", "A", "sends", "B", "A", "binomial"]
    assert lines["dp-lora"].split()[1:8] == [
        "steps",
        "A+B",
        "A+B",
        "sends",
        "A+B",
        "A+B",
        "identity",
    ]


def test_the_command_starts_without_torch_and_flower():
    loaded = "sorted({'torch', 'flwr', 'ray'} & set(sys.modules))"
    code = f"import sys, lalora_app.cli.main; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# --- run --------------------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fail at any attempt to start a process or to open a port."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)


BAD = {
    "unknown key": ("lora.rnk=4", ["lora.rnk=4", '"lora.rank"']),
    "mistyped": ('lora.rank="4"', ["lora.rank='4'", "int"]),
    "boolean for a number": ("seed=true", ["seed=True", "int"]),
    "zero epsilon": ("privacy.epsilon=0", ["privacy.epsilon=0.0", "greater than 0"]),
    "NaN epsilon": ("privacy.epsilon=nan", ["privacy.epsilon=nan", "greater than 0"]),
    "delta of 1": ("privacy.delta=1.0", ["privacy.delta=1.0", "(0, 1)"]),
    "clip without bound": (
        "privacy.epsilon=3 privacy.clip-norm=inf",
        ["privacy.clip-norm=inf", "epsilon=3.0"],
    ),
    "momentum of adamw": (
        'train.optimizer="adamw" train.momentum=0.9',
        ["train.momentum=0.9", "adamw"],
    ),
    "relative output": ('output="here"', ["output='here'", "absolute"]),
    "no quotes": ("method=rolora", ["method=rolora", "quotes"]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_override_is_one_line_before_anything_starts(case, nothing_starts, capsys):
    override, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        launch.read_launch(ROOT, [override], None)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message
    assert main.main(["run", str(ROOT), "-c", override]) == 2
    assert capsys.readouterr().err == f"lalora: {message}\n"


def test_good_overrides_pass(nothing_starts, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text('method = "rolora"\n[lora]\nrank = 4\n', "utf-8")
    launch.read_launch(ROOT, [], None)
    launch.read_launch(ROOT, ['method="dp-lora" privacy.epsilon=inf', "seed=3"], None)
    launch.read_launch(ROOT, [str(preset)], None)


def test_a_later_override_wins(nothing_starts, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text("[lora]\nrank = 0\n", "utf-8")
    with pytest.raises(ConfigError, match=r"lora\.rank=0"):
        launch.read_launch(ROOT, ["lora.rank=4", str(preset)], None)
    launch.read_launch(ROOT, [str(preset), "lora.rank=4"], None)


@pytest.fixture
def flower(monkeypatch):
    """What Flower's own parser reads of the command that a launch gives it."""
    read = {}

    def run(arguments, env, cwd):
        given = [value for flag, value in pairwise(arguments) if flag == "-c"]
        read.update(parse_config_args(given))
        return "1"

    monkeypatch.setattr(flower_engine, "start_run", run)
    monkeypatch.setattr(flower_engine, "check_launch", lambda launch: None)
    monkeypatch.setattr(start, "needs_hub", lambda launch: False)
    monkeypatch.setattr(flower_engine, "follow", lambda *args: ("completed", ""))
    return read


PASSED = {
    "nothing": ([], {}),
    "empty": ([""], {}),
    "spaces around =": (["privacy.epsilon = 1.0"], {"privacy.epsilon": 1.0}),
    "an integer for a number": (["privacy.epsilon=1"], {"privacy.epsilon": 1.0}),
    "infinity": (["privacy.epsilon=inf"], {"privacy.epsilon": math.inf}),
    "quotes and a backslash": ([r"""lora.targets='a"b\c'"""], {"lora.targets": r'a"b\c'}),
    "= in quotes": (['data.name="/a b/c = d.csv"'], {"data.name": "/a b/c = d.csv"}),
    "a boolean": (["data.public-size=true"], {"data.public-size": True}),
    "a plan": (['compare="/r/s/plan.json"'], {"compare": "/r/s/plan.json"}),
    "pairs over a file": (["FILE", "lora.rank=2 seed=5"], {"lora.rank": 2, "seed": 5}),
    "a file over pairs": (["lora.rank=2 seed=5", "FILE"], {"lora.rank": 4, "seed": 5}),
}


@pytest.mark.parametrize("case", list(PASSED))
def test_what_was_checked_is_what_runs(case, flower, tmp_path):
    overrides, expected = PASSED[case]
    preset = tmp_path / "preset.toml"
    preset.write_text("[lora]\nrank = 4\n", "utf-8")
    given = [str(preset) if text == "FILE" else text for text in overrides]
    assert start.launch(ROOT, given, nodes=2, engine="flower") == 0
    assert flower == expected
    assert all(type(flower[key]) is type(value) for key, value in expected.items())


def test_a_preset_of_the_repository_passes(flower):
    smoke = str(ROOT / "configs" / "smoke.toml")
    assert start.launch(ROOT, [smoke], nodes=2, engine="flower") == 0
    assert flower == {"num-server-rounds": 2, "train.local-steps": 2, "train.batch-size": 16}


def test_names_with_a_dot_are_seen_from_the_file_or_from_here(flower, tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    preset = tmp_path / "sets" / "mine.toml"
    preset.write_text('[model]\nname = "timm:../m"\n[data]\nname = "./d"\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    assert start.launch(ROOT, ["sets/mine.toml"], nodes=2, engine="flower") == 0
    assert flower["model.name"] == f"timm:{tmp_path / 'm'}"
    assert flower["data.name"] == str(tmp_path / "sets" / "d")
    assert start.launch(ROOT, ['data.name="./e" model.name="a/b"'], nodes=2, engine="flower") == 0
    assert flower["data.name"] == str(tmp_path / "e")
    assert flower["model.name"] == "a/b"


def test_17_a_bare_name_of_an_existing_file_or_folder_is_a_path(flower, tmp_path, monkeypatch):
    (tmp_path / "file.csv").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (
        start.launch(ROOT, ['data.name="file.csv" model.name="model"'], nodes=2, engine="flower")
        == 0
    )
    assert flower["data.name"] == str(tmp_path / "file.csv")
    assert flower["model.name"] == str(tmp_path / "model")
    assert (
        start.launch(ROOT, ['data.name="imdb" model.name="timm:model"'], nodes=2, engine="flower")
        == 0
    )
    assert flower["data.name"] == "imdb"
    assert flower["model.name"] == f"timm:{tmp_path / 'model'}"
    assert absolute({"data.name": "new.csv.gz"}, tmp_path)["data.name"] == f"{tmp_path}/new.csv.gz"
    for nothing in ({"data.name": ""}, {"data.name": "~/x.csv"}, {"model.name": "timm:"}):
        assert absolute(nothing, tmp_path) == nothing


def test_a_narrowed_comparison_runs_no_control_that_is_not_asked_for(
    nothing_starts, tmp_path, capsys
):
    text = (
        '[compare]\nseeds = [0]\nmethods = ["dp-lora"]\n'
        '[[compare.controls]]\nmethod = "flora"\nepsilons = [3.0]\n'
    )
    (tmp_path / "plan.toml").write_text(f'output = "{tmp_path}"\n{text}', "utf-8")
    command = ["compare", str(tmp_path / "plan.toml"), "--app", str(ROOT), "--table-only"]
    assert main.main([*command, "--methods", "la-lora,rolora", "--epsilons", "1"]) == 0
    assert "0 of 2 runs" in capsys.readouterr().out
    assert main.main([*command, "--methods", "rolora,flora", "--epsilons", "1,3"]) == 0
    assert "0 of 3 runs" in capsys.readouterr().out


def test_a_folder_without_an_app_is_one_line(nothing_starts, tmp_path, capsys):
    assert main.main(["run", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == f"lalora: app={tmp_path} must be a folder with the app's pyproject.toml\n"


@pytest.mark.parametrize("content", [None, b"= no toml", b"method = '\xff'"])
def test_a_preset_that_cannot_be_read_is_one_line(nothing_starts, tmp_path, content):
    file = tmp_path / "preset.toml"
    if content:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"-c .*preset\.toml must be") as caught:
        launch.read_launch(ROOT, [str(file)], None)
    assert "\n" not in str(caught.value)


def test_clients_get_a_core_and_where_there_is_a_gpu_a_share_of_it(monkeypatch):
    plain = "num-supernodes=8 client-resources-num-cpus=1"
    assert flower_engine.resources(8, 0, 4) == plain
    assert flower_engine.resources(8, 1, 4) == f"{plain} client-resources-num-gpus=0.25"
    assert flower_engine.resources(8, 2, 3) == f"{plain} client-resources-num-gpus=0.3333"
    monkeypatch.setattr(flower_engine.shutil, "which", lambda tool: None)
    assert flower_engine._gpus() == 0


def test_gpus_are_counted_from_the_drivers_own_list(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: 1)'\necho 'GPU 1: A (UUID: 2)'\n", "utf-8")
    tool.chmod(0o755)
    monkeypatch.setattr(flower_engine.shutil, "which", lambda name: str(tool))
    assert flower_engine._gpus() == 2


@pytest.mark.parametrize("number", ["0", "-1", "many"])
@pytest.mark.parametrize("option", ["--nodes", "--clients-per-gpu"])
def test_fewer_than_one_client_is_refused(option, number, capsys):
    with pytest.raises(SystemExit) as refused:
        main.main(["run", option, number])
    assert refused.value.code == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run", "--nodes=--"], ["audit", "--epsilon=--"]])
def test_an_option_with_two_dashes_as_its_value_is_refused(command, capsys):
    with pytest.raises(SystemExit) as refused:
        main.main(command)
    assert refused.value.code == 2
    assert f"argument {command[1][:-3]}: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["lora.rank", "seed 3", "seed=3 and more", "=3"])
def test_text_that_is_no_pair_is_told(nothing_starts, text):
    with pytest.raises(ConfigError, match="-c"):
        launch.read_launch(ROOT, [text], None)


def test_a_child_without_the_environment_of_its_parent_is_stopped_too(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_engine, "_GRACE", 1.0)
    ignore = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    # The pid is written once the child ignores SIGTERM: it then outlives its parent.
    child = f"{ignore}; print(os.getpid(), flush=True); time.sleep(60)"
    run = f"subprocess.run([sys.executable, '-c', {child!r}], env={{}})"
    with subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; {run}"],
        env={"FLWR_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        pid = int(parent.stdout.readline())
        flower_engine._stop(tmp_path)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def send_and_wait(end):
    os.kill(os.getpid(), end)
    time.sleep(5)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_launch_is_ended_by_either_signal_and_leaves_the_handlers_as_they_were(end):
    before = signal.signal(end, signal.SIG_IGN)  # as under nohup
    try:
        with pytest.raises(KeyboardInterrupt), start._interruptible():
            send_and_wait(end)
        assert signal.getsignal(end) is signal.SIG_IGN
    finally:
        signal.signal(end, before)


def test_an_interrupted_command_has_the_exit_code_of_an_interruption(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "launch", interrupted)
    assert main.main(["run", str(ROOT)]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (0.5, 0), (1.2, 1)])
def test_where_rdp_keeps_the_books_they_may_only_be_above_the_second_opinion(
    tmp_path, capsys, monkeypatch, factor, code
):
    """10,000 releases at ε of about 60: RDP is safe there, and some percent above the PLD."""
    path = tmp_path / "ledger.sqlite"
    booked(Ledger(path), "d", "run", 1, Release(0.06, 1.0, 10_000))
    honest = ledger_command.second_epsilon
    monkeypatch.setattr(ledger_command, "second_epsilon", lambda *args: factor * honest(*args))
    assert main.main(["ledger", "verify", "--path", str(path), "--delta", "1e-5"]) == code
    out = capsys.readouterr().out
    assert "RDP 64." in out
    assert ("DISAGREE" in out) == bool(code)


# --- shared noise -----------------------------------------------------------------------------


@pytest.fixture
def two_numbers(ledger):
    """The ledger of above, and one round with shared noise on other data."""
    limits = {"planned": 4, "run_limit": NO_LIMIT, "node_limit": NO_LIMIT}
    ledger.reserve("ward", "run-3", 1, RELEASE, alone=1.0, **limits)
    return ledger


def test_show_has_both_epsilons_where_noise_was_shared_and_says_who_must_be_honest(
    two_numbers, capsys
):
    assert main.main(["ledger", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    own, shared = ([line for line in lines if line.startswith(d)] for d in ("mail", "ward"))
    assert "alone" not in "".join(own)
    first, second = (accounting.epsilon([Release(0.05, z, 4)], 1e-5) for z in (2.0, 1.0))
    assert len(shared) == 2
    for line in shared:
        assert line.endswith(f"epsilon {first:.3f}  |  epsilon-alone {second:.3f}")
    assert lines[-2].startswith("epsilon holds against the server, other clients and users")
    assert lines[-1].startswith("epsilon-alone holds against a server that opens")
    assert main.main(["ledger", "show", "--dataset", "mail"]) == 0
    assert "alone" not in capsys.readouterr().out


def test_verify_computes_both_epsilons_again(two_numbers, capsys, monkeypatch):
    assert main.main(["ledger", "verify", "--dataset", "ward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["agree"] * 4
    assert [line.startswith("    epsilon-alone") for line in lines[:4]] == [False, True] * 2
    honest = ledger_command.second_epsilon

    def wrong_alone(releases, delta):
        return honest(releases, delta) * (0.9 if releases[0].noise_multiplier == 1.0 else 1.0)

    monkeypatch.setattr(ledger_command, "second_epsilon", wrong_alone)
    assert main.main(["ledger", "verify", "--dataset", "ward"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["agree", "DISAGREE"] * 2


def test_verify_has_a_limit_of_its_own_for_each_epsilon(two_numbers, capsys):
    first, second = (accounting.epsilon([Release(0.05, z, 4)], 1e-5) for z in (2.0, 1.0))
    between, command = str((first + second) / 2), ["ledger", "verify", "--dataset", "ward"]
    assert main.main([*command, "--max-epsilon", between]) == 0
    assert main.main([*command, "--max-epsilon-alone", str(1.01 * second)]) == 0
    capsys.readouterr()
    assert main.main([*command, "--max-epsilon-alone", between]) == 1
    assert capsys.readouterr().out.count(f"above max-epsilon-alone {between}") == 2
    # Of own noise, the one ε is both.
    assert main.main(["ledger", "verify", "--dataset", "mail", "--max-epsilon-alone", "0.01"]) == 1


def test_export_has_a_column_more_where_noise_was_shared(two_numbers, capsys):
    assert main.main(["ledger", "export"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["alone_multiplier"] for line in lines] == ["", "", "", "1.0"]
    assert main.main(["ledger", "export", "--dataset", "mail"]) == 0
    assert "alone" not in capsys.readouterr().out
