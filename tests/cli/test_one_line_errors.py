"""Bad input and damaged files cost one line and an exit code, in every subcommand."""

from pathlib import Path

import pytest

from conftest import ROOT
from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.cli import main
from lalora_app.privacy.ledger import Ledger, LedgerBusyError
from lalora_app.privacy.policy import PolicyError
from lalora_app.private_step.attach import LayoutError
from lalora_app.server import ending


@pytest.fixture
def finished(tiny, monkeypatch):
    """The folder of a finished run with one round."""
    monkeypatch.setattr(ending, "_write_report", lambda folder: None)
    config = tiny(**{"num-server-rounds": 1, "train.local-steps": 2})
    server_app.run(FakeGrid(config, 2), config)
    return next(Path(config.output).glob("*/summary.json")).parent


def one_line(capsys, command):
    code = main.main(command)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("lalora: ")
    return lines[0]


APPS = {
    "another project": '[project]\nname = "other"\n',
    "a Flower app without a config": '[tool.flwr.app]\npublisher = "x"\n',
    "no tables on the way": "tool = 3\n",
    "a config that is no table": "[tool.flwr.app]\nconfig = 1\n",
}


@pytest.mark.parametrize("case", list(APPS))
@pytest.mark.parametrize("words", [["run"], ["audit", "--fast", "--app"]])
def test_an_app_without_a_run_config_is_named_with_the_missing_table(case, words, tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text(APPS[case], "utf-8")
    line = one_line(capsys, [*words, str(tmp_path)])
    assert f"app={tmp_path}" in line
    assert "[tool.flwr.app.config]" in line


def test_an_app_whose_file_is_no_toml_is_one_line(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text("= no toml", "utf-8")
    assert "must be TOML" in one_line(capsys, ["run", str(tmp_path)])


@pytest.mark.parametrize("command", ["merge", "diagnose"])
def test_a_folder_without_a_run_is_one_line(command, tmp_path, capsys):
    rest = [str(tmp_path / "out")] if command == "merge" else []
    assert f"run={tmp_path} must be" in one_line(capsys, [command, str(tmp_path), *rest])


@pytest.mark.parametrize("command", ["merge", "diagnose"])
@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_damaged_checkpoint_is_one_line(content, command, finished, tmp_path, capsys):
    (file,) = finished.glob("checkpoints/attempt-*.safetensors")
    file.write_bytes(content)
    rest = [str(tmp_path / "out")] if command == "merge" else []
    one_line(capsys, [command, str(finished), *rest])


@pytest.mark.parametrize("command", ["merge", "diagnose"])
def test_the_checkpoint_before_a_damaged_last_one_is_not_taken(
    command, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ending, "_write_report", lambda folder: None)
    config = tiny(**{"num-server-rounds": 2, "train.local-steps": 2})
    server_app.run(FakeGrid(config, 2), config)
    folder = next(Path(config.output).glob("*/summary.json")).parent
    last = sorted((folder / "checkpoints").glob("*.safetensors"))[-1]
    last.write_bytes(b"damaged")
    out = [str(tmp_path / "merged")] if command == "merge" else []
    line = one_line(capsys, [command, str(folder), *out])
    assert "undamaged checkpoint of its last attempt, 2" in line


def test_a_damaged_ledger_is_one_line(tmp_path, capsys):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database" * 100)
    assert "database" in one_line(capsys, ["ledger", "show", "--path", str(path)])


@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_locked_ledger_is_one_line(action, tmp_path, capsys, monkeypatch):
    def locked(self, *args):
        raise LedgerBusyError("the ledger is in use by another process")

    path = tmp_path / "ledger.sqlite"
    Ledger(path)
    for read in ("entries", "damage"):
        monkeypatch.setattr(Ledger, read, locked)
    limit = ["--max-epsilon", "3"] if action == "verify" else []
    assert main.main(["ledger", action, "--path", str(path), *limit]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "lalora: the ledger is in use by another process"


def test_weights_that_cannot_be_written_are_one_line(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way", "utf-8")
    out = tmp_path / "file" / "out"
    line = one_line(capsys, ["merge", str(finished), str(out)])
    assert f"{tmp_path / 'file'}: File exists" in line


def test_a_damaged_summary_of_a_comparison_is_one_line(tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'output = "{tmp_path}"\n[compare]\nseeds = [0]\nmethods = ["dp-lora"]\nepsilons = [1.0]\n'
    )
    summary = tmp_path / "plan" / "dp-lora-eps1-seed0" / "run" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text("{", "utf-8")
    command = ["compare", str(plan), "--app", str(ROOT), "--table-only"]
    assert f"{summary} must be JSON" in one_line(capsys, command)


RAISED = {
    "OSError with a file": (
        PermissionError(13, "Permission denied", "/x"),
        "/x: Permission denied",
    ),
    "OSError of a library": (OSError("no such model\nTry again"), "no such model"),
    "OSError without text": (TimeoutError(), "TimeoutError"),
    "LayoutError": (LayoutError("a.weight: mixes examples"), "a.weight: mixes examples"),
    "PolicyError": (PolicyError("method must be one of"), "method must be one of"),
}
COMMANDS = [
    ["diagnose", "x"],
    ["merge", "x", "y"],
    ["methods"],
    ["ledger", "show"],
    ["policy", "x"],
]
COMMANDS += [["credentials", "ca", "x"], ["run"], ["compare", "x"], ["audit"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("case", list(RAISED))
def test_every_subcommand_reports_expected_errors_in_one_line(case, command, monkeypatch, capsys):
    error, text = RAISED[case]
    parser = main._parser()

    def act(args):
        raise error

    parse = parser.parse_args
    monkeypatch.setattr(main, "_parser", lambda: parser)
    monkeypatch.setattr(
        parser,
        "parse_args",
        lambda argv: main.argparse.Namespace(**{**vars(parse(argv)), "act": act}),
    )
    assert one_line(capsys, command) == f"lalora: {text}"


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(main, "_methods", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["methods"])
