"""`lalora plan`: its numbers are those of a run, its file starts one, and it touches nothing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from helpers.app_runs import ledger_entries, run, sized
from lalora_app.cli import main, plan_command
from lalora_app.privacy import planning
from lalora_app.privacy.ledger import state_folder
from lalora_app.results.run_folder import to_toml
from lalora_app.settings.run_config import flatten
from lalora_app.shared_noise.run_constants import noise_multiplier
from lalora_app.simulation.launch import read_launch

# The run of helpers.app_runs: 180 examples per client, batches of 12, six steps.
SMALL = ["--min-steps", "6", "--local-steps", "2", "--max-examples", "72"]


@pytest.fixture
def no_accountant(monkeypatch):
    """Noise by a formula, where the accountant plays no part."""

    def noise(epsilon, delta, q, steps, past):
        return 1 + q * steps**0.5

    monkeypatch.setattr(planning, "_noise_multiplier", noise)


@pytest.fixture
def plan(tiny, tmp_path, capsys):
    """Plan the tests' tiny run with changes; return exit code, lines by their first word, error."""

    def call(*options, **changes):
        file = tmp_path / "run.toml"
        file.write_text(to_toml(tiny(**sized() | changes)), "utf-8")
        code = main.main(["plan", str(ROOT), "--nodes", "2", "-c", str(file), *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def row_of(lines: list[str], mark: str) -> dict[str, str]:
    """The cells of the marked line of the table, by column."""
    titles = next(line for line in lines if line.split()[:2] == ["batch", "steps"]).split()
    rows = [line for line in lines if line.startswith(" ")]
    (row,) = [line for line in rows if mark in line.split("  ")[-1].split(", ")]
    return dict(zip(titles, row.split(), strict=False))


@pytest.mark.usefixtures("no_waiting", "no_report")
@pytest.mark.parametrize("head", ["auto", "class-means"])
def test_the_written_run_draws_the_noise_that_was_printed(head, plan, tiny, tmp_path):
    """The plan's own file is run, and the clients' ledgers hold the plan's z."""
    file = tmp_path / "planned.toml"
    changes = {"train.batch-size": 9, "model.head": head}
    code, lines, err = plan(*SMALL, "--write", str(file), **changes)
    assert (code, err) == (0, "")
    best, before = row_of(lines, "best"), row_of(lines, "now")
    assert (best["batch"], best["steps"], best["local"]) == ("12", "6", "2")
    assert float(best["own"]) < float(before["own"])
    launch = read_launch(ROOT, [str(file)], 2)
    done = run(replace(launch.config, output=tiny().output), 2)
    entries = ledger_entries()
    sums = [entry for entry in entries if entry.release.sampling_rate == 1]
    assert len(sums) == (2 if head == "class-means" else 0)
    steps = [entry for entry in entries if entry not in sums]
    assert sum(entry.release.count for entry in steps) == 2 * 6
    for entry in steps:
        z = entry.release.noise_multiplier
        assert entry.release.sampling_rate == pytest.approx(12 / 180)
        assert float(best["z"]) == pytest.approx(z, rel=1e-3)
    assert len(done.rows) == int(best["rounds"]) == 3 + len(sums) // 2


SHARED = {
    "method": "rolora",
    "privacy.noise-share": "sum",
    "secure-aggregation": "secagg+",
    "train.local-steps": 1,
    "train.sampling-rate": 0.05,
    "train.optimizer": "sgd",
    "min-clients": 3,
    "min-replies": 3,
    "data.partitioner": "linear",
}


def test_a_run_with_shared_noise_is_planned_by_its_sampling_rate(plan, tmp_path):
    file = tmp_path / "planned.toml"
    limits = ["--nodes", "3", "--min-steps", "6", "--max-examples", "72"]
    code, lines, err = plan(*limits, "--write", str(file), **SHARED)
    assert (code, err) == (0, "")
    assert lines[0] == (
        "clients   3, 3 in a round, with 60 to 180 examples each; z is that of all, by one "
        "sampling rate"
    )
    best, before = row_of(lines, "best"), row_of(lines, "now")
    assert (best["batch"], best["steps"], best["local"]) == ("12", "6", "1")
    assert (before["batch"], before["times"]) == ("6", f"{float(before['times']):.2f}")
    assert float(best["shared"]) < float(best["own"])
    config = read_launch(ROOT, [str(file)], 3).config
    assert (config.train.sampling_rate, config.num_server_rounds) == (12 / 120, 6)
    assert float(best["z"]) == pytest.approx(noise_multiplier(config), rel=1e-3)
    _, known, _ = plan(*limits, **SHARED | {"train.union-size": 720})
    assert row_of(known, "now")["batch"] == "12"  # of 240 examples per client


def test_a_rate_for_own_noise_is_planned_too(plan, no_accountant):
    code, lines, _ = plan(*SMALL, **{"train.sampling-rate": 0.05})
    assert code == 0
    assert row_of(lines, "now")["batch"] == "9"
    assert row_of(lines, "best")["batch"] == "12"


def test_shared_noise_takes_one_local_step(plan):
    code, _, err = plan("--nodes", "3", "--local-steps", "1,2", **SHARED)
    assert code == 2
    assert '--local-steps 1,2 must be 1 for privacy.noise-share="sum"' in err


def test_the_file_holds_the_printed_choice_and_the_commands_keys(plan, tmp_path, no_accountant):
    file = tmp_path / "planned.toml"
    _, lines, _ = plan(*SMALL, "--epsilon", "2", "--write", str(file))
    best = row_of(lines, "best")
    keys = flatten(read_launch(ROOT, [str(file)]).config)
    named = {"train.batch-size": "batch", "train.local-steps": "local"}
    named |= {"num-server-rounds": "rounds"}
    assert {key: str(keys[key]) for key in named} == {k: best[c] for k, c in named.items()}
    assert keys["privacy.epsilon"] == 2.0
    assert keys["lora.rank"] == 2  # of the file that the command was given
    assert f"run       lalora run {ROOT} --nodes 2 -c {file}" in lines


def test_a_plan_leaves_no_file_and_fits_the_page(plan, tmp_path, no_accountant):
    code, lines, err = plan("--max-seconds", "500", "--examples-per-second", "20")
    assert (code, err) == (0, "")
    assert max(map(len, lines)) <= 100
    assert {path.name for path in tmp_path.iterdir()} <= {"run.toml", "home"}
    assert not state_folder({}).exists() or not list(state_folder({}).iterdir())
    assert lines[-1].startswith("ok        no data was sent, no ledger was opened")


def test_the_largest_numbers_fit_the_page(plan, no_accountant):
    options = ["--examples", "99000", "--max-examples", "1" + "0" * 14, "--min-steps", "60000"]
    code, lines, _ = plan(*options, "--examples-per-second", "0.1")
    assert code == 0
    assert max(map(len, lines)) <= 100
    assert row_of(lines, "best")["batch"] == "99000"
    assert row_of(lines, "best")["time"] == "3e+07"  # hours


def test_clients_are_dealt_as_in_the_run(plan, no_accountant):
    _, lines, _ = plan()
    assert lines[0].startswith("clients   2, 2 in a round, with 180 examples each")
    _, lines, _ = plan(**{"data.partitioner": "linear", "train.batch-size": 8})
    assert lines[0].startswith("clients   2, 2 in a round, with 120 to 240 examples each")


def test_the_one_client_of_a_central_run_has_the_whole_split(plan, no_accountant):
    alone = {"central": True, "min-clients": 1, "min-replies": 1}
    deal = {"data.partitioner": "pathological", "data.classes-per-client": 1}  # drops a class
    code, lines, err = plan("--nodes", "1", **alone | deal)
    assert (code, err) == (0, "")
    assert lines[0].startswith("clients   1, 1 in a round, with 360 examples each")


def test_the_planned_rounds_are_more_than_those_of_the_head_alone(plan, tmp_path, no_accountant):
    file = tmp_path / "planned.toml"
    head = {"train.head-rounds": 3, "num-server-rounds": 5, "model.head": "class-means"}
    code, lines, err = plan(*SMALL, "--write", str(file), **head)
    assert (code, err) == (0, "")
    assert row_of(lines, "best")["rounds"] == "5"  # class sums, three rounds of the head, one more
    assert read_launch(ROOT, [str(file)], 2).config.num_server_rounds == 5


def test_the_rows_of_a_clients_own_file_are_counted(plan, tmp_path, no_accountant):
    """Labels and texts play no part: there is no label column, and all texts are equal."""
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"text": "call"}) + "\n" + (json.dumps({"text": ""}) + "\n") * 69)
    _, lines, _ = plan("--data-path", str(own))
    assert lines[0].startswith("clients   2, 2 in a round, with 70 examples each")


def test_the_default_limit_is_the_cost_of_the_config(plan, no_accountant):
    _, lines, _ = plan("--examples", "180")
    assert "limits    at least 40 steps, at most 72 examples per client" in lines
    _, lines, _ = plan("--examples", "180", **{"fraction-train": 0.5, "min-replies": 1})
    # One of two clients trains in each of three rounds: two rounds at most.
    assert "limits    at least 40 steps, at most 48 examples per client" in lines


def test_the_duration_depends_on_whose_machine_it_is(plan, no_accountant):
    options = ["--examples", "180", "--examples-per-second", "2", *SMALL]
    together, apart = plan(*options)[1], plan(*options, "--sites")[1]
    # 72 examples of two clients, two per second.
    assert row_of(together, "now")["time"] == "0:01:12"
    assert row_of(apart, "now")["time"] == "0:00:36"


def test_local_steps_are_those_that_the_method_allows(plan, no_accountant):
    _, lines, _ = plan("--examples", "180", **{"method": "la-lora"})
    local = {line.split()[2] for line in lines if re.match(r" +\d+ +\d+ +\d", line)}
    assert local == {"2", "4"}
    _, lines, _ = plan("--examples", "180", **{"method": "rolora"})
    local = {line.split()[2] for line in lines if re.match(r" +\d+ +\d+ +\d", line)}
    assert local == {"1", "2", "4"}


REFUSED = {
    "n below the batch": (["--examples", "11"], "train.batch-size=12 must be at most 11"),
    "epsilon of a run": (["-c", "privacy.epsilon=0.0"], "privacy.epsilon=0.0 must be greater"),
    "no privacy": (["--epsilon", "inf"], "privacy.epsilon=inf must be finite"),
    "tiny epsilon": (["--epsilon", "1e-9"], "privacy.epsilon=1e-09 must be larger"),
    "tiny share of the head": (
        ["-c", 'model.head="class-means" privacy.head-share=1e-9'],
        "privacy.head-share=1e-09 must be at least",
    ),
    "delta and n": (["--delta", "0.01"], "privacy.delta=0.01 must be below 1/n"),
    "no step": (["--max-examples", "39"], "--max-examples 39 must be enough for one example"),
    "no time": (
        ["--max-seconds", "1", "--examples-per-second", "1"],
        "--max-seconds 1 must be enough for one example in each of 40 steps (--min-steps): at this "
        "speed they take 80 s",
    ),
    "time without speed": (["--max-seconds", "9"], "--max-seconds 9 must come with"),
    "sites without speed": (["--sites"], "--sites must come with"),
    "a trial on a site's file": (["--trial", "--data-path", "x"], "must come without --trial"),
    "many rounds": (
        ["-c", f"num-server-rounds={10**12}"],
        f"num-server-rounds={10**12} must be at most 500000",
    ),
    "many steps": (["--min-steps", str(10**12)], f"--min-steps {10**12} must be at most"),
    "one local step": (["--local-steps", "2,1"], "train.local-steps=1 must be at least 2"),
    "no TOML": (["--write", "plan.txt"], "--write plan.txt must end in .toml"),
    "no folder": (["--write", "/no/plan.toml"], "--write /no/plan.toml must be a new file"),
    "no file": (["--data-path", "/no.csv"], "--data-path"),
    "a comparison": (["-c", 'compare="/x.json"'], 'compare must be "none"'),
    "more replies than clients": (["-c", "min-replies=3"], "min-replies=3 must be at most 2"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_input_is_refused_in_one_line(case, plan, monkeypatch):
    options, words = REFUSED[case]
    if not case.startswith("tiny"):
        monkeypatch.setattr(planning, "calibrate", lambda *args, **kwargs: 1 / 0)
    code, lines, err = plan(*options)
    assert code == 2
    assert lines == []
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_file_that_is_there_is_not_overwritten(plan, tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 1\n", "utf-8")
    code, _, err = plan("--write", str(tmp_path / "mine.toml"))
    assert code == 2
    assert "must be a new file" in err
    assert (tmp_path / "mine.toml").read_text("utf-8") == "seed = 1\n"


def test_planning_imports_no_torch_and_no_flower():
    code = (
        "import sys\nfrom lalora_app.cli import main\n"
        "main.main(['plan', '.', '--examples', '2000', '--local-steps', '4', '--min-steps', '8', "
        "'--max-examples', '8', '-c', 'train.batch-size=1 num-server-rounds=2'])\n"
        "print(sorted({'torch', 'flwr', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    plan_command._progress(2, 15)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    plan_command._progress(2, 15)
    assert "calibrating noise, 3 of 15" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_measures_the_runs_speed_and_bytes(plan, no_accountant):
    code, lines, err = plan("--trial", *SMALL)
    assert (code, err) == (0, "timing some steps and an evaluation\n")
    own = row_of(lines, "now")
    assert re.fullmatch(r"\d+:\d\d:\d\d", own["time"])
    assert re.fullmatch(r"0\.0\d/0\.0\d", own["MB"])
    assert max(map(len, lines)) <= 100
    assert not Path(state_folder({})).exists() or not list(state_folder({}).iterdir())
