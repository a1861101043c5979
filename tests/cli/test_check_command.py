"""`lalora check`: what it prints of a run and of a site's own data, and what it refuses."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest

from conftest import ROOT
from lalora_app.cli import main
from lalora_app.cli.check_command import _label_counts
from lalora_app.client import trial_step
from lalora_app.data.examples import split
from lalora_app.data.partition import clients_data
from lalora_app.data.task_division import division_of
from lalora_app.models.backbone import build
from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.results.run_folder import to_toml
from lalora_app.secagg.peers import new_identity, public_text
from lalora_app.site_files.peer_key import make_peer_key

PRIVATE = {"privacy.epsilon": 0.8, "privacy.delta": 1e-5, "privacy.noise": "secure"}


@pytest.fixture
def check(tiny, tmp_path, capsys):
    """Run the command on the tests' tiny run with changes; return exit code, lines and error."""

    def call(*options, **changes):
        file = tmp_path / "run.toml"
        file.write_text(to_toml(tiny(**{"min-clients": 2, "min-replies": 2} | changes)), "utf-8")
        code = main.main(["check", str(ROOT), "--nodes", "2", "-c", str(file), *options])
        out, err = capsys.readouterr()
        found: dict[str, str] = {}
        for line in out.splitlines():
            word = line.split()[0]
            found[word] = f"{found[word]}\n{line}" if word in found else line
        return code, found, err

    return call


@pytest.fixture
def own_file(tmp_path):
    """A site's file of 60 texts, three of them long."""
    rows = [{"text": "good film " * (1 + 20 * (i < 3)), "label": i % 2} for i in range(60)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_a_run_is_described_and_leaves_nothing(check, tiny):
    code, found, err = check()
    config = tiny()
    train, test = split(config.data)
    assert (code, err) == (0, "")
    assert f"{len(train)} rows to train on, {len(test)} to test" in found["data"]
    assert found["clients"].startswith("clients   2, with ")
    assert found["labels"] == f"labels    0 {train.labels.count(0)}, 1 {train.labels.count(1)}"
    backbone, start = build(config)
    assert f" {backbone.targets} layers with LoRA (" in found["model"]
    assert f" {sum(array.size for array in start.values()):,} of " in found["model"]
    assert re.search(r"step      [\d.e-]+ s \(B\), [\d.e-]+ s \(A\) with", found["step"])
    assert found["ok"] == "ok        no data was sent or written, no privacy budget was spent"
    assert not state_folder({}).exists() or not list(state_folder({}).iterdir())


def test_a_site_s_file_is_described_with_the_texts_that_would_be_cut(check, own_file):
    code, found, _ = check("--data-path", str(own_file), **{"model.max-length": 16})
    assert code == 0
    assert found["data"] == f"data      {own_file}: 60 rows"
    assert found["labels"] == "labels    0 30, 1 30"
    assert "3 of 60 are cut at model.max-length=16" in found["lengths"]
    assert found["warning"].startswith("warning   no limit")
    node = f"data-path='{own_file}' max-epsilon=1.0 delta=1e-5"
    code, found, _ = check("--node-config", node, **PRIVATE)
    assert "warning" not in found
    assert found["limit"].startswith("limit     epsilon 0 of 1 is spent")


def test_what_earlier_runs_have_spent_counts(check, own_file, tmp_path):
    node = f"data-path='{own_file}' dataset-id='d' max-epsilon=1.0 delta=1e-5"
    assert check("--node-config", node, **PRIVATE)[0] == 0
    limit = Limit(1.0, 1e-5)
    Ledger(state_folder({}) / "ledger.sqlite").reserve(
        "d", "earlier", 1, Release(0.1, 1.5, 3), planned=3, run_limit=limit, node_limit=limit
    )
    code, _, err = check("--node-config", node, **PRIVATE)
    assert code == 2
    assert "max-epsilon=1 does not allow this run" in err


TASKS = PRIVATE | {"method": "dp-lora", "data.tasks": 2, "num-server-rounds": 5}


def test_each_task_of_a_run_has_a_line_with_its_own_steps_rows_and_noise(check, tiny):
    code, found, _ = check(**TASKS)
    assert code == 0
    config = tiny(**TASKS | {"data.labels": "0,1"})
    parts = [Counter(part.labels) for part in clients_data(config, 2)]
    steps = [6, 4]  # of rounds 1 to 3, and of rounds 4 and 5
    lines = found["privacy"].splitlines()
    assert len(lines) == 2
    for task, line in enumerate(lines):
        rows = min(part[task] for part in parts)
        noise = calibrate(0.8, 1e-5, sampling_rate=8 / rows, steps=steps[task])
        assert line.startswith(f"privacy   task {task + 1} with {rows} rows: {steps[task]} steps ")
        assert f" with sampling rate {8 / rows:.3g}: noise multiplier {noise:.3g}" in line


@pytest.mark.parametrize(("spent", "code"), [("1", 2), ("2", 2), ("", 2), ("none", 0)])
def test_what_a_task_has_spent_counts_for_its_own_rows_only(check, own_file, tiny, spent, code):
    node = f"data-path='{own_file}' dataset-id='d' max-epsilon=1.0 delta=1e-5 class-tasks=true"
    division = division_of(tiny(**TASKS | {"data.labels": "0,1"}))
    limit, part = Limit(1.0, 1e-5), f"{division.name}/{spent}" if spent else ""
    Ledger(state_folder({}) / "ledger.sqlite").reserve(
        *("d", "earlier", 1, Release(0.1, 1.5, 3)),
        planned=3,
        run_limit=limit,
        node_limit=limit,
        part=part,
    )
    found, lines, err = check("--node-config", node, **TASKS)
    assert found == code
    assert ("max-epsilon=1 does not allow this run" in err) == (code == 2)
    assert code or len(lines["privacy"].splitlines()) == 2


SHARED = PRIVATE | {
    "privacy.noise-share": "sum",
    "secure-aggregation": "secagg+",
    "method": "rolora",
    "train.local-steps": 1,
    "train.sampling-rate": 0.1,
    "train.union-size": 240,
    "train.optimizer": "sgd",
    "min-clients": 4,
    "min-replies": 3,
}


@pytest.fixture
def policy(tmp_path):
    """Write a policy that allows shared noise; return the node config of a site with it."""

    def write(own_file, alone, peers=0):
        file = tmp_path / "policy.toml"
        lines = [public_text(new_identity()) for _ in range(peers)]
        listed = f"peers = {json.dumps(lines)}\n" if lines else ""
        file.write_text(
            "max-epsilon = 1.0\ndelta = 1e-5\n"
            f"[shared-noise]\nmax-epsilon-alone = {alone}\n{listed}",
            "utf-8",
        )
        key = tmp_path / "peer.pem"
        if not key.exists():
            make_peer_key(key)
        return f"data-path='{own_file}' dataset-id='d' policy='{file}' peer-key='{key}'"

    return write


@pytest.mark.parametrize(("peers", "sites"), [(0, 4), (7, 8)])
def test_shared_noise_has_a_second_limit(check, own_file, policy, peers, sites):
    code, found, err = check("--node-config", policy(own_file, 50.0, peers), **SHARED)
    assert (code, err) == (0, "")
    z = calibrate(0.8, 1e-5, sampling_rate=0.1, steps=2)
    opened = Release(0.1, z / math.sqrt(sites - 1), 2)
    expected = f"with {sites} sites this run alone has {epsilon([opened], 1e-5):.3g}"
    assert found["alone"] == f"alone     epsilon-alone 0 of 50 is spent; {expected}"


def test_a_run_beyond_the_limit_of_uploads_alone_is_refused(check, own_file, policy):
    code, _, err = check("--node-config", policy(own_file, 1.0), **SHARED)
    assert code == 2
    assert "max-epsilon-alone=1 does not allow this run: the node's epsilon-alone would be" in err


def test_uploads_of_earlier_runs_count_with_their_own_noise(check, own_file, policy):
    limit, earlier = Limit(1.0, 1e-5), Release(0.1, 3.0, 3)
    Ledger(state_folder({}) / "ledger.sqlite").reserve(
        "d", "earlier", 1, earlier, planned=3, run_limit=limit, node_limit=limit, alone=1.0
    )
    changes = SHARED | {"privacy.epsilon": 0.5}
    code, found, _ = check("--node-config", policy(own_file, 50.0), **changes)
    assert code == 0
    spent = epsilon([replace(earlier, noise_multiplier=1.0)], 1e-5)
    assert f"epsilon-alone {spent:.3g} of 50 is spent" in found["alone"]
    assert f"epsilon {epsilon([earlier], 1e-5):.3g} of 1 is spent" in found["limit"]


@pytest.fixture
def check_csv(tiny, tiny_keys, tmp_path, capsys):
    """Check a .csv file of two labels as a site, with no key of the data but those of the test."""
    tiny()  # sets the folder of the ledger

    def call(labels=("0", "1"), node="", given=""):
        file = tmp_path / "own.csv"
        rows = "".join(f"good film {i},{labels[i % 2]}\n" for i in range(60))
        file.write_text(f"text,label\n{rows}", "utf-8")
        keys = {key: value for key, value in tiny_keys.items() if not key.startswith("data.")}
        run = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
        site = ["--data-path", str(file), "--node-config", node]
        code = main.main(["check", str(ROOT), *site, "-c", f"{run} {given}"])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("given", ["", 'data.labels="auto" data.num-labels=0'])
def test_a_site_that_says_nothing_has_the_defaults_of_its_node_config(check_csv, given):
    code, out, err = check_csv(given=given)
    assert (code, err) == (0, "")
    assert "labels    0 30, 1 30\n" in out


@pytest.mark.parametrize("given", ["", 'data.labels="auto"', "data.num-labels=2"])
def test_names_of_a_site_stand_in_for_those_that_a_run_leaves_open(check_csv, given):
    code, out, err = check_csv(("ham", "spam"), "labels='spam,ham'", given)
    assert (code, err) == (0, "")
    assert "labels    spam 30, ham 30\n" in out


OTHER_RUNS = {
    "data.num-labels=3": "data.num-labels=3 must be 2",
    'data.labels="a,b,c"': "data.num-labels=3 must be 2",
    'data.input-column="review"': 'data.input-column="review" must be "text"',
}


@pytest.mark.parametrize("given", list(OTHER_RUNS))
def test_a_run_that_the_site_would_refuse_is_one_line(check_csv, given):
    code, _, err = check_csv(given=given)
    assert code == 2
    assert err == f"lalora: {OTHER_RUNS[given]}, the node config's value or its default\n"


REFUSED = {
    "no data": ({"--node-config": "max-epsilon=1.0 delta=1e-5"}, "must have data-path"),
    "no pair": ({"--node-config": "data-path"}, "--node-config 'data-path' must be key=value"),
    "no site worker": (
        {"--node-config": "data-path='FILE' worker=1"},
        "node config worker=1 must be true or false",
    ),
    "no file": ({"--data-path": "/no/such.csv"}, "data-path"),
    "a policy of the site": (
        {"--node-config": "data-path='FILE' max-epsilon=0.01 delta=1e-5"},
        "max-epsilon=0.01 does not allow this run: the node's epsilon would be",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_a_site_would_refuse_is_refused_in_one_line(case, check, own_file):
    options, words = REFUSED[case]
    given = [part.replace("FILE", str(own_file)) for pair in options.items() for part in pair]
    code, _, err = check(*given)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_too_small_an_epsilon_for_a_site_is_one_line(check, own_file):
    code, _, err = check("--data-path", str(own_file), **{"privacy.epsilon": 0.001})
    assert code == 2
    assert err.startswith("lalora: privacy.epsilon=0.001 must be at least")


def test_many_classes_are_summarised():
    names = tuple(map(str, range(100)))
    assert _label_counts(names, (3, 3, 4)) == "100 classes with 0 to 2 rows, 98 without any"


def test_a_measured_step_leaves_the_model_as_it_was(tiny):
    config = tiny()
    model, start = build(config)
    train, _ = split(config.data)
    cost = trial_step.measure_step(config, model, start, model.encode(train))
    assert set(cost.seconds) == {"A", "B"}
    assert all(seconds > 0 for seconds in cost.seconds.values())
    assert cost.peak_bytes > 2**20
    after = model.adapter()
    assert all((after[name] == start[name]).all() for name in start)
