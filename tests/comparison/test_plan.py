"""A comparison's plan: its runs, its tuning, and what it refuses before anything starts."""

import math

import pytest

from conftest import defaults
from lalora_app.comparison.plan import RATES, PlanCell
from lalora_app.comparison.plan_file import narrowed, read_plan
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import parse

INF = math.inf


def plan_of(**compare):
    tables = {"compare": compare, "num-server-rounds": 3, "data.test-split": "validation"}
    return read_plan(tables, defaults())


def test_cells_are_methods_times_epsilons_times_seeds_seed_by_seed():
    plan = plan_of(methods=["dp-lora", "rolora"], epsilons=[1.0, INF], seeds=[5, 6])
    cells = plan.cells({})
    expected = [(m, e, s) for s in (5, 6) for m in ("dp-lora", "rolora") for e in (1.0, INF)]
    found = [(c.config["method"], c.config["privacy.epsilon"], c.config["seed"]) for c in cells]
    assert found == expected
    assert [c.folder for c in cells][:2] == ["dp-lora-eps1-seed5", "dp-lora-epsinf-seed5"]
    assert len({c.folder for c in cells}) == len(cells)
    assert all(c.config["num-server-rounds"] == 3 for c in cells)


def test_budgets_and_scales_that_are_nearly_alike_have_folders_of_their_own():
    close = [1.0, math.nextafter(1.0, 2.0)]
    tune = {"grid": close, "seeds": [7], "test-fraction": 0.5}
    plan = plan_of(methods=["dp-lora"], epsilons=close, seeds=[5], tune=tune)
    for cells, runs in ((plan.cells({}), 2), (plan.tuning_cells(), 4)):
        assert len({cell.folder for cell in cells}) == len(cells) == runs


def test_without_settings_it_is_the_papers_five_methods_at_three_budgets_and_seeds():
    plan = read_plan({}, defaults())
    assert len(plan.cells({})) == 5 * 3 * 3
    assert plan.tuning_cells() == []


def test_every_run_waits_for_all_nodes():
    assert {cell.config["min-clients"] for cell in plan_of(nodes=7).cells({})} == {7}


def test_a_control_differs_by_its_own_settings_at_its_own_budgets():
    control = {
        "label": "momentum",
        "method": "la-lora-no-filter",
        "epsilons": [3.0],
        "config": {"train": {"momentum": 0.5}},
    }
    plan = plan_of(methods=["la-lora"], epsilons=[1.0, 3.0], seeds=[0], controls=[control])
    plain, same_budget, own = plan.cells({})
    assert (own.label, own.epsilon, own.folder) == ("momentum", 3.0, "momentum-eps3-seed0")
    assert own.config["method"] == "la-lora-no-filter"
    differing = {k for k in own.config if own.config[k] != same_budget.config[k]}
    assert differing == {"method", "train.momentum"}
    assert plain.config["train.momentum"] == 0.0


TUNE = {"grid": [0.5, 1.0, 2.0], "seeds": [100], "test-fraction": 0.25}


def test_tuning_runs_scale_all_rates_and_never_see_the_test_split():
    tables = {
        "compare": {"methods": ["full"], "epsilons": [1.0], "tune": TUNE},
        "data": {"test-split": "validation"},
    }
    plan = read_plan(tables, defaults())
    cells = plan.tuning_cells()
    assert [cell.scale for cell in cells] == TUNE["grid"]
    for cell in cells:
        assert [cell.config[k] for k in RATES] == [defaults()[k] * cell.scale for k in RATES]
        assert cell.config["data.test-split"] == "none"
        assert cell.config["data.test-fraction"] == 0.25
        assert cell.config["seed"] == 100
        assert cell.config["evaluate-every"] == defaults()["num-server-rounds"]
        assert cell.config["privacy.epsilon"] == 1.0
    assert all(cell.config["data.test-split"] == "validation" for cell in plan.cells({}))


def test_tuning_leaves_the_rate_of_whole_weights_to_methods_that_train_them():
    cells = plan_of(methods=["rolora"], epsilons=[1.0], tune=TUNE).tuning_cells()
    assert {cell.config["train.lr-w"] for cell in cells} == {defaults()["train.lr-w"]}
    assert {cell.config["train.lr-a"] / cell.scale for cell in cells} == {defaults()["train.lr-a"]}


def test_every_line_is_tuned_at_each_of_its_budgets_with_every_seed():
    control = {"label": "control", "method": "la-lora", "epsilons": [3.0]}
    own = TUNE | {"seeds": [7, 8]}
    plan = plan_of(methods=["rolora"], epsilons=[1.0, INF], controls=[control], tune=own)
    cells = plan.tuning_cells()
    lines = [("rolora", 1.0), ("rolora", INF), ("control", 3.0)]
    found = [(cell.method_at_epsilon, cell.scale, cell.config["seed"]) for cell in cells]
    assert found == [(line, scale, s) for line in lines for scale in TUNE["grid"] for s in (7, 8)]
    assert len({cell.folder for cell in cells}) == len(cells)


def test_the_best_scale_of_a_line_is_the_most_accurate_on_average_and_of_equals_the_smaller():
    own = TUNE | {"seeds": [7, 8]}
    plan = plan_of(methods=["rolora", "dp-lora"], epsilons=[1.0, 3.0], tune=own)
    accuracies = {  # of the seeds, scale by scale: the best single run is not the best mean
        ("rolora", 1.0): ((0.9, 0.1), (0.6, 0.6), (0.6, 0.6)),
        ("rolora", 3.0): ((0.1, 0.2), (0.2, 0.2), (0.3, 0.4)),
        ("dp-lora", 1.0): ((0.3, 0.3),) * 3,
        ("dp-lora", 3.0): ((0.3, 0.3), (0.4, 0.4), (0.1, 0.9)),
    }
    results = [
        (
            cell,
            accuracies[cell.method_at_epsilon][TUNE["grid"].index(cell.scale)][
                cell.config["seed"] - 7
            ],
        )
        for cell in plan.tuning_cells()
    ]
    best = {
        ("rolora", 1.0): 1.0,
        ("rolora", 3.0): 2.0,
        ("dp-lora", 1.0): 0.5,
        ("dp-lora", 3.0): 2.0,
    }
    assert plan.best(results) == plan.best(results[::-1]) == best
    for cell in plan.cells(best):
        assert cell.config["train.lr-a"] == defaults()["train.lr-a"] * best[cell.method_at_epsilon]


def test_tuning_needs_a_test_split_of_its_own():
    tables = {"compare": {"tune": TUNE}}
    told = r'data\.test-split="none" must name a split .* folder with two'
    with pytest.raises(ConfigError, match=told):
        read_plan(tables, defaults())


def test_every_cell_is_a_run_config():
    for cell in plan_of(tune=TUNE).cells({}):
        assert isinstance(cell, PlanCell)
        parse(cell.config)


OVERRULED = {
    "method": "rolora",
    "seed": 3,
    "privacy.epsilon": 1.0,
    "min-clients": 9,
    "output": "/tmp/x",
    "compare": "/tmp/plan.json",
}
BAD = {
    "an unknown key": ({"metods": ["la-lora"]}, r"compare\.metods must be one of"),
    "no such method": ({"methods": ["la-lore"]}, 'did you mean "la-lora"'),
    "no method": ({"methods": []}, r"compare\.methods=\[\]"),
    "a method twice": ({"methods": ["la-lora", "la-lora"]}, r"compare\.methods="),
    "a budget of zero": ({"epsilons": [0.0]}, r"privacy\.epsilon=0\.0 must be greater than 0"),
    "a budget in words": ({"epsilons": ["three"]}, r"compare\.epsilons="),
    "a budget twice": ({"epsilons": [1.0, 1]}, r"compare\.epsilons="),
    "a seed that is no integer": ({"seeds": [0.5]}, r"compare\.seeds="),
    "a boolean seed": ({"seeds": [True]}, r"compare\.seeds="),
    "no nodes": ({"nodes": 0}, r"compare\.nodes=0"),
    "half a grid": ({"tune": {"grid": [1.0]}}, r"compare\.tune\.seeds"),
    "a negative rate": ({"tune": TUNE | {"grid": [-1.0]}}, r"train\.lr-a=-2\.0 must be"),
    "an unknown key of a control": (
        {"controls": [{"method": "la-lora", "label": "x", "eps": [1.0]}]},
        r"compare\.controls=.*'eps'.* must have a method, and may have config, epsilons, label",
    ),
    "a control without a method": ({"controls": [{"label": "x"}]}, r"compare\.controls"),
    "a control that is no table": (
        {"controls": ["la-lora-full"]},
        r"compare\.controls='la-lora-full' must be a table",
    ),
    "controls in single brackets": (
        {"controls": {"method": "la-lora-full"}},
        r"compare\.controls=\{'method': 'la-lora-full'\} must be .* \[\[compare\.controls\]\]",
    ),
    "a control's config that is no table": (
        {"controls": [{"method": "la-lora", "label": "x", "config": "x"}]},
        r"compare\.controls\.config='x' must be a table",
    ),
    "a control's method that is no text": (
        {"controls": [{"method": 3}]},
        r"compare\.controls\.method=3 must be a text",
    ),
    "a tuning that is no table": ({"tune": 3}, r"compare\.tune=3 must be a table"),
    "a fraction in words": (
        {"tune": TUNE | {"test-fraction": "10%"}},
        r"compare\.tune\.test-fraction='10%' must be a number in \(0, 1\)",
    ),
    "an empty name": ({"name": ""}, r"compare\.name='' must be the name of a folder"),
    "the folder above": ({"name": ".."}, r"compare\.name='\.\.' must be the name of a folder"),
    "the folder itself": ({"name": "."}, r"compare\.name='\.' must be the name of a folder"),
    "a name that is none": ({"name": 3}, r"compare\.name=3 must be a text"),
    "a budget beyond all floats": ({"epsilons": [3.0, -(10**400)]}, r"privacy\.epsilon=-inf must"),
    **{
        f"{key} of a control's run, which the plan sets": (
            {"controls": [{"method": "la-lora", "label": "x", "config": {key: value}}]},
            rf"compare\.controls\.config: {key}={value!r} must be left out: .* sets it$",
        )
        for key, value in OVERRULED.items()
    },
    "an unknown key of a run": (
        {"controls": [{"method": "la-lora", "label": "x", "config": {"lora": {"rnk": 2}}}]},
        r'lora\.rnk=2 is no key of a run; did you mean "lora\.rank"',
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_plan_is_one_line_before_anything_starts(case):
    compare, words = BAD[case]
    with pytest.raises(ConfigError, match=words) as caught:
        plan_of(**compare)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["fast", [1], True, {"of": 1}])
def test_a_learning_rate_that_is_no_number_is_one_line(value):
    with pytest.raises(ConfigError, match=r"train\.lr-a") as caught:
        read_plan({"train": {"lr-a": value}}, defaults())
    assert "\n" not in str(caught.value)


def test_a_comparison_that_is_no_table_is_one_line():
    with pytest.raises(ConfigError, match=r"^compare=3 must be a table$"):
        read_plan({"compare": 3}, defaults())


def names_and_budgets(controls):
    return [(c.get("label", c["method"]), c.get("epsilons")) for c in controls]


MOMENTUM = {"method": "la-lora-full-no-filter", "label": "momentum", "epsilons": [1.0, 3.0]}
OWN = {
    "methods": ["dp-lora", "la-lora"],
    "epsilons": [1.0, 3.0, INF],
    "controls": [MOMENTUM, {"method": "flora", "epsilons": [3]}, {"method": "hetlora"}],
}
BOTH = [("momentum", [1.0, 3.0]), ("flora", [3]), ("hetlora", None)]
NARROWED = {
    "nothing": ({}, OWN["methods"], BOTH),
    "seeds": ({"seeds": [7]}, OWN["methods"], BOTH),
    "methods": ({"methods": ["la-lora", "rolora"]}, ["la-lora", "rolora"], []),
    "a control": ({"methods": ["flora", "rolora"]}, ["rolora"], BOTH[1:2]),
    "a control's method": ({"methods": [MOMENTUM["method"]]}, [MOMENTUM["method"]], []),
    "controls only": ({"methods": ["hetlora", "momentum"]}, [], [BOTH[0], BOTH[2]]),
    "a budget": ({"epsilons": [1.0]}, OWN["methods"], [("momentum", [1.0]), BOTH[2]]),
    "other budgets": ({"epsilons": [3.0, 9.0]}, OWN["methods"], [("momentum", [3.0]), *BOTH[1:]]),
    "both": ({"methods": ["rolora", "flora"], "epsilons": [1.0]}, ["rolora"], []),
}


@pytest.mark.parametrize("case", list(NARROWED))
def test_a_command_line_narrows_the_controls_too(case):
    given, methods, controls = NARROWED[case]
    found = narrowed(OWN, given)
    assert found["methods"] == methods
    assert names_and_budgets(found["controls"]) == controls
    assert names_and_budgets(OWN["controls"]) == BOTH  # left as it was
    for key in given.keys() - {"methods"}:
        assert found[key] == given[key]
    read_plan({"compare": found}, defaults())


def test_without_controls_the_methods_are_what_is_asked_for():
    assert narrowed({"name": "x"}, {"methods": ["rolora"]})["methods"] == ["rolora"]
