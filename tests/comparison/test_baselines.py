"""The baselines of a plan: head-only, no privacy, and one client with all data."""

import json
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import defaults
from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.comparison.baselines import central_label, with_baselines, with_central_keys
from lalora_app.comparison.finished_cells import find_completed
from lalora_app.comparison.plan import parse_cell
from lalora_app.comparison.plan_file import narrowed, read_plan
from lalora_app.comparison.runner import run_plan
from lalora_app.comparison.summary import PLAN, prepare, records, summarise
from lalora_app.methods.compatibility import CENTRAL
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten

INF = math.inf
TUNE = {"grid": [0.5, 1.0], "seeds": [9], "test-fraction": 0.2}


def plan_of(tables=(), **compare):
    keys = {"data.test-split": "validation", **dict(tables)}
    return read_plan({"compare": compare, **keys}, defaults())


def lines(plan):
    return [(entry.label, entry.epsilons) for entry in plan.entries]


def test_one_word_adds_a_head_a_run_without_privacy_and_one_client_with_all_data():
    plan = plan_of(methods=["la-lora", "rolora"], epsilons=[1.0, 3.0], baselines=True, tune=TUNE)
    every = (1.0, 3.0, INF)
    central = "la-lora (one client with all data)"
    labels = ["la-lora", "rolora", "head-only", central]
    assert lines(plan) == [(label, every) for label in labels]
    tuned = {cell.method_at_epsilon for cell in plan.tuning_cells()}
    assert tuned == {(label, epsilon) for label in labels for epsilon in every}
    assert plan.reference == "la-lora"


def test_what_the_plan_has_already_is_not_added_again():
    plan = plan_of(methods=["head-only", "la-lora"], epsilons=[INF, 1.0], baselines=True)
    label = central_label("head-only")
    assert lines(plan) == [(name, (INF, 1.0)) for name in ("head-only", "la-lora", label)]


def test_without_the_word_a_plan_is_as_before():
    assert lines(plan_of(methods=["la-lora"], epsilons=[1.0])) == [("la-lora", (1.0,))]
    assert not any(cell.config["central"] for cell in plan_of(methods=["la-lora"]).cells({}))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_the_one_client_takes_the_batch_of_all_clients_of_a_round(fraction):
    keys = {"fraction-train": fraction, "train.batch-size": 8, "min-replies": 1}
    plan = plan_of(keys, methods=["la-lora"], epsilons=[1.0], nodes=6, seeds=[0], baselines=True)
    for cell in plan.cells({}):
        one = cell.label == central_label("la-lora")
        together = 8 * max(1, round(6 * fraction))
        assert cell.config["train.batch-size"] == (together if one else 8)
        assert cell.config["central"] is one
        assert cell.config["min-clients"] == (1 if one else 6)
        assert parse_cell(cell).privacy.epsilon == cell.epsilon


def test_what_needs_several_clients_is_taken_out_of_the_cell_with_one():
    keys = {
        "secure-aggregation": "secagg+",
        "min-replies": 4,
        "weighting": "uniform",
    }
    robust = {"robust": "trimmed-mean", "suspects": 1, "min-replies": 3}
    ranks = {"lora.ranks": "2,4", "method": "flora"}
    for own in (keys, robust, {"lora.ranks": "2,4"}):
        control = {"method": ranks["method"] if "lora.ranks" in own else "dp-lora", "label": "one"}
        control |= {"config": own | {"central": True}}
        (cell,) = plan_of(methods=[], controls=[control], epsilons=[1.0], seeds=[0]).cells({})
        assert {key: cell.config[key] for key in CENTRAL} == CENTRAL


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(1e-6, 1.0), st.integers(1, 500))
def test_the_total_batch_is_at_least_that_of_one_client_and_at_most_of_all(batch, fraction, nodes):
    own = {"central": True, "train.batch-size": batch, "fraction-train": fraction}
    together = with_central_keys(own, nodes)["train.batch-size"]
    assert batch <= together <= batch * nodes
    assert together % batch == 0
    if fraction == 1.0:
        assert together == batch * nodes
    assert with_central_keys(own | {"central": False}, nodes)["train.batch-size"] == batch


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["la-lora", "rolora", "head-only"]), min_size=1, unique=True),
    st.lists(st.sampled_from([1.0, 3.0, INF]), min_size=1, unique=True),
)
def test_baselines_added_twice_are_those_added_once(methods, epsilons):
    table = {"methods": methods, "epsilons": epsilons, "controls": [], "baselines": True}
    once = with_baselines(table)
    assert with_baselines(once) == once
    assert with_baselines(once | {"baselines": True}) == once
    assert once["methods"][: len(methods)] == methods
    assert once["epsilons"][: len(epsilons)] == epsilons
    assert INF in once["epsilons"]


OWN = {"methods": ["dp-lora", "la-lora"], "epsilons": [1.0, 3.0], "baselines": True}
ONE = central_label("dp-lora")
NARROWED = {
    "nothing": ({}, ["dp-lora", "la-lora", "head-only", ONE], (1.0, 3.0, INF)),
    "methods": ({"methods": ["la-lora"]}, ["la-lora"], (1.0, 3.0, INF)),
    "a baseline": ({"methods": ["head-only", ONE]}, ["head-only", ONE], (1.0, 3.0, INF)),
    "epsilons": ({"epsilons": [3.0]}, ["dp-lora", "la-lora", "head-only", ONE], (3.0,)),
    "both": ({"methods": [ONE, "dp-lora"], "epsilons": [INF]}, ["dp-lora", ONE], (INF,)),
}


@pytest.mark.parametrize("case", list(NARROWED))
def test_the_command_line_narrows_baselines_as_other_lines(case):
    given_keys, labels, epsilons = NARROWED[case]
    table = narrowed(OWN, given_keys)
    assert lines(plan_of(**table)) == [(label, epsilons) for label in labels]


def test_the_option_adds_baselines_to_what_is_left():
    given_keys = {"methods": ["la-lora"], "baselines": True}
    table = narrowed({"methods": ["dp-lora", "la-lora"]}, given_keys)
    labels = ["la-lora", "head-only", central_label("la-lora")]
    assert [label for label, _ in lines(plan_of(**table))] == labels


BAD = {
    "a word": ({"baselines": "yes"}, r"compare\.baselines='yes' must be true or false"),
    "no method": ({"methods": [], "baselines": True}, r"compare\.methods=\[\] must name a method"),
    "methods": ({"methods": "la-lora", "baselines": True}, r"compare\.methods='la-lora' must be"),
    "epsilons": ({"epsilons": 1.0, "baselines": True}, r"compare\.epsilons=1\.0 must be a list"),
    "controls": ({"controls": 1, "baselines": True}, r"compare\.controls=1 must be tables"),
    "a reference": ({"reference": "x"}, r"compare\.reference='x' must be one of dp-lora, "),
    "no text": ({"reference": 3}, r"compare\.reference=3 must be one of dp-lora, "),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_plan_is_one_line(case):
    compare, words = BAD[case]
    with pytest.raises(ConfigError, match=f"^{words}") as caught:
        plan_of(**compare)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_told_that_it_has_no_head():
    keys = {"model.task": "causal-lm", "model.pooling": "model", "data.label-column": "none"}
    keys |= {"data.partitioner": "iid"}
    told = r'^head-only-eps1-seed0: model\.task="causal-lm" must be a classification'
    with pytest.raises(ConfigError, match=told):
        plan_of(keys, methods=["dp-lora"], epsilons=[1.0], seeds=[0], baselines=True)


def test_the_reference_may_be_any_line():
    assert plan_of(methods=["la-lora", "rolora"], reference="rolora").reference == "rolora"
    label = central_label("la-lora")
    assert plan_of(methods=["la-lora"], baselines=True, reference=label).reference == label


@pytest.fixture
def tables(tiny):
    config = tiny(**{"privacy.epsilon": INF, "num-server-rounds": 1, "train.batch-size": 4})
    keys = {k: v for k, v in flatten(config).items() if v != defaults().get(k)}
    compare = {"name": "tiny", "nodes": 3, "methods": ["ffa-lora"], "epsilons": [INF]}
    return {"compare": compare | {"seeds": [0, 1], "baselines": True}, **keys}


def run(tables, run_one=server_app.run):
    plan, folder = prepare(tables, defaults())
    grid = FakeGrid(plan.cells({})[0].config, plan.nodes)
    run_plan(grid, str(folder / PLAN), defaults(), run_one, 0.0)
    return plan, folder, grid


@pytest.mark.usefixtures("no_report", "no_waiting")
def test_all_lines_run_over_one_grid_and_are_compared_to_the_first(tables):
    plan, folder, grid = run(tables)
    found = {(r.label, r.seed): r for r in records(plan, folder)}
    one = central_label("ffa-lora")
    assert {label for label, _ in found} == {"ffa-lora", "head-only", one}
    assert {r.clients for r in found.values() if r.label == one} == {1}
    assert {r.clients for r in found.values() if r.label != one} == {3}
    counts = [r.partition["clients"] for r in found.values()]
    assert len({sum(map(sum, clients)) for clients in counts}) == 1  # the same examples in all
    trained = [e for e in grid.trained() if e.request.content["run"]]
    asked = [json.loads(e.request.content["run"]["run-config"])["central"] for e in trained]
    assert (sum(asked), len(asked)) == (2, 2 + 2 * 2 * 3)
    told = summarise(plan, folder)
    assert "Difference to ffa-lora at the same ε" in told
    assert "head-only" in (folder / "differences.md").read_text("utf-8")
    assert r"\begin{tabular}" in (folder / "differences.tex").read_text("utf-8")
    begun = []
    run(tables, lambda *args: begun.append(args))
    assert begun == []


@pytest.mark.usefixtures("no_report", "no_waiting")
def test_a_comparison_finished_before_a_key_existed_is_still_finished(tables):
    del tables["compare"]["baselines"]
    plan, folder, _ = run(tables)
    for file in folder.glob("*/*/config.toml"):
        kept = [x for x in file.read_text("utf-8").splitlines() if not x.startswith("central = ")]
        file.write_text("\n".join(kept) + "\n", "utf-8")
        assert "central" not in tomllib.loads(file.read_text("utf-8"))
    begun = []
    plan, folder, _ = run(tables, lambda *args: begun.append(args))
    assert begun == []
    assert len(records(plan, folder)) == 2
    changed, cell = next(folder.glob("*/*/config.toml")), plan.cells({})[0]
    whole = changed.read_text("utf-8")
    changed.write_text(f'{whole}"data.text-column" = "text"\n', "utf-8")
    with pytest.raises(ConfigError, match=r"was run with data\.text-column, which is no key"):
        [find_completed(folder, each) for each in plan.cells({})]
    changed.write_text(whole, "utf-8")
    assert find_completed(folder, cell)
    other, _ = prepare(tables | {"central": True}, defaults())
    with pytest.raises(ConfigError, match=r"must be .* another compare\.name"):
        find_completed(Path(folder), other.cells({})[0])
