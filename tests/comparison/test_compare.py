"""Comparisons over FakeGrid: cut short and resumed, never mixed with other settings."""

import json
from pathlib import Path

import pytest

from conftest import defaults
from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.comparison.finished_cells import find_completed
from lalora_app.comparison.runner import _eta, run_plan
from lalora_app.comparison.summary import PLAN, prepare, read_file, records, summarise
from lalora_app.data.examples import split
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten

pytestmark = pytest.mark.usefixtures("no_report")  # of single runs; the summary has its own
INF = float("inf")


@pytest.fixture
def tables(tiny):
    """A plan of two methods and two seeds on the tiny model and data, without a budget."""
    config = tiny(**{"privacy.epsilon": INF, "num-server-rounds": 1, "train.batch-size": 4})
    keys = {k: v for k, v in flatten(config).items() if v != defaults().get(k)}
    compare = {
        "name": "tiny",
        "nodes": 2,
        "methods": ["ffa-lora", "dp-lora"],
        "epsilons": [INF],
        "seeds": [0, 1],
    }
    return {"compare": compare, **keys}


@pytest.fixture
def tuned_tables(tables, tiny_data, tmp_path):
    """The same with a tuning of one method, and data that has a test split of its own."""
    lines = Path(tiny_data).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    for name, part in (("train", lines[:320]), ("test", lines[320:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(part), "utf-8")
    tune = {"grid": [1e-6, 1.0], "seeds": [9], "test-fraction": 0.2}
    tables["compare"] |= {"methods": ["ffa-lora"], "seeds": [0], "tune": tune}
    return tables | {"data.name": str(tmp_path / "data"), "data.test-split": "test"}


def run(tables, run_one=server_app.run):
    plan, folder = prepare(tables, defaults())
    config = plan.cells({})[0].config
    grid = FakeGrid(config, plan.nodes)
    run_plan(grid, str(folder / PLAN), defaults(), run_one, 0.0)
    return plan, folder, grid


def test_every_run_has_its_own_folder_config_and_result(tables):
    plan, folder, _ = run(tables)
    found = records(plan, folder)
    assert [(r.label, r.seed) for r in found] == [
        (label, seed) for seed in (0, 1) for label in ("ffa-lora", "dp-lora")
    ]
    for record, cell in zip(found, plan.cells({}), strict=True):
        assert record.method == cell.config["method"]
        assert record.summary["status"] == "completed"
        assert sum(map(sum, record.partition["clients"])) > 300
    sends = {r.label: r.summary["upload_bytes_per_round"] for r in found}
    assert sends["ffa-lora"] < sends["dp-lora"]


def test_a_runs_config_repeats_that_run_and_not_the_comparison(tables):
    plan, folder = prepare(tables, defaults())
    file = str(folder / PLAN)
    given = defaults() | {"compare": file}  # as the run config says it
    begun = []
    run_plan(FakeGrid({}, 2), file, given, lambda _, config, __: begun.append(config.compare), 0.0)
    assert begun == ["none"] * len(plan.cells({}))


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_results_that_have_nowhere_to_go_are_one_line(tables, tmp_path, output):
    (tmp_path / "file").write_text("", "utf-8")
    (tmp_path / "tiny").write_text("", "utf-8")  # where the folder of the comparison would be
    for taken in (tmp_path / output, tmp_path):
        with pytest.raises(ConfigError, match=f'output="{taken / "tiny"}" must be writable'):
            prepare(tables | {"output": str(taken)}, defaults())


def test_the_summary_is_written_as_tables_and_a_report(tables):
    plan, folder, _ = run(tables)
    table = summarise(plan, folder)
    assert "ffa-lora" in table
    assert "4 of 4 runs are finished; tables" in table
    assert r"\begin{tabular}" not in table
    assert r"\begin{tabular}" in summarise(plan, folder, latex=True)
    assert "dp-lora" in (folder / "table.md").read_text("utf-8")
    assert len((folder / "runs.csv").read_text("utf-8").splitlines()) == 1 + 4
    assert r"\begin{tabular}" in (folder / "table.tex").read_text("utf-8")
    assert "<svg" in (folder / "report.html").read_text("utf-8")


def test_before_the_first_run_is_finished_it_says_so_and_writes_nothing(tables):
    tables["compare"]["tune"] = {"grid": [0.5, 1.0], "seeds": [9], "test-fraction": 0.2}
    tables["data.test-split"] = "validation"
    plan, folder = prepare(tables, defaults())
    told = summarise(plan, folder, latex=True)
    assert told == f"lalora: 0 of 4 runs and 0 of 4 tuning runs are finished, in {folder}"
    assert [path.name for path in folder.iterdir()] == [PLAN]


def test_what_is_done_is_not_run_again(tables):
    run(tables)
    done = []
    plan, folder, grid = run(tables, lambda *args: done.append(args))
    assert done == []
    assert grid.exchanges == []
    assert len(records(plan, folder)) == 4


def test_a_comparison_cut_short_goes_on_where_it_was(tables):
    done = []

    class PowerCut(BaseException):
        pass

    def two_and_a_half(grid, config, settle):
        if len(done) == 2:
            Path(config.output).mkdir(parents=True)
            (Path(config.output) / "half").mkdir()
            raise PowerCut
        done.append(config.output)
        server_app.run(grid, config, settle)

    with pytest.raises(PowerCut):
        run(tables, two_and_a_half)
    again = []

    def counted(grid, config, settle):
        again.append(config.output)
        server_app.run(grid, config, settle)

    plan, folder, _ = run(tables, counted)
    assert [Path(p).name for p in done + again] == [cell.folder for cell in plan.cells({})]
    assert len(records(plan, folder)) == 4


def test_one_run_that_fails_costs_no_other_and_fails_the_comparison(tables):
    def seed_zero_only(grid, config, settle):
        if config.seed == 1 and config.method == "ffa-lora":
            raise RuntimeError("out of luck")
        server_app.run(grid, config, settle)

    with pytest.raises(RuntimeError, match=r"1 runs failed: ffa-lora-epsinf-seed1: out of luck"):
        run(tables, seed_zero_only)
    plan, folder = prepare(tables, defaults())
    assert len(records(plan, folder)) == 3


def test_rates_are_never_chosen_by_half_a_tuning(tuned_tables):
    begun = []

    def half(grid, config, settle):
        begun.append(Path(config.output).name)
        if "x1-" in config.output:
            raise RuntimeError("out of luck")
        server_app.run(grid, config, settle)

    with pytest.raises(RuntimeError, match=r"1 runs failed: tuning/ffa-lora-epsinf-x1-seed9: out"):
        run(tuned_tables, half)
    assert begun == ["ffa-lora-epsinf-x1e-06-seed9", "ffa-lora-epsinf-x1-seed9"]


@pytest.mark.parametrize(
    ("elapsed", "done", "left", "told"), [(5.0, 0, 9, ""), (60.0, 2, 10, ", ETA 5 min")]
)
def test_the_time_left_is_told_once_a_run_has_been_timed(elapsed, done, left, told):
    assert _eta(elapsed, done, left) == told


def test_what_is_wrong_with_the_first_run_is_told_once(tables):
    begun = []

    def no_data(grid, config, settle):
        begun.append(config.method)
        raise ConfigError('data.name="lost" must exist')

    with pytest.raises(ConfigError, match=r'ffa-lora-epsinf-seed0: data\.name="lost" must exist'):
        run(tables, no_data)
    assert begun == ["ffa-lora"]


def test_a_bad_run_stops_no_other_where_one_is_finished(tables):
    def first_only(grid, config, settle):
        if (config.method, config.seed) != ("ffa-lora", 0):
            raise RuntimeError("later")
        server_app.run(grid, config, settle)

    with pytest.raises(RuntimeError, match="3 runs failed"):
        run(tables, first_only)

    def one_bad(grid, config, settle):
        if (config.method, config.seed) == ("dp-lora", 0):  # the first of the missing
            raise ConfigError("no such entry")
        server_app.run(grid, config, settle)

    with pytest.raises(RuntimeError, match=r"1 runs failed: dp-lora-epsinf-seed0: no such entry"):
        run(tables, one_bad)
    plan, folder = prepare(tables, defaults())
    assert len(records(plan, folder)) == 3


def test_data_that_cannot_be_used_is_told_before_the_tuning(tuned_tables):
    tuned_tables["data.test-split"] = "tset"
    begun = []
    with pytest.raises(ConfigError, match=r"^ffa-lora-epsinf-seed0: data\.name=.* split tset"):
        run(tuned_tables, lambda *args: begun.append(args))
    assert begun == []


def test_what_is_finished_needs_its_data_no_more(tables, tiny_data, tmp_path):
    tables["data.name"] = str(tmp_path / "texts.jsonl")
    Path(tables["data.name"]).write_bytes(Path(tiny_data).read_bytes())
    run(tables)
    Path(tables["data.name"]).unlink()
    split.cache_clear()
    plan, folder, _ = run(tables, lambda *args: pytest.fail("run again"))
    assert len(records(plan, folder)) == 4


def test_a_finished_run_is_never_taken_for_one_with_other_settings(tables):
    run(tables)
    changed = tables | {"train.lr-a": 0.123}
    plan, folder = prepare(changed, defaults())
    with pytest.raises(ConfigError, match=r"train\.lr-a=0\.123 must be .* another compare\.name"):
        find_completed(folder, plan.cells({})[0])


def test_tuning_chooses_by_data_that_the_test_split_does_not_hold(tuned_tables):
    plan, folder, _ = run(tuned_tables)
    accuracies = {}
    for cell in plan.tuning_cells():
        path = find_completed(folder, cell)
        accuracies[cell.scale] = json.loads((path / "summary.json").read_text())["accuracy"]
    better = max(accuracies, key=lambda scale: (accuracies[scale], -scale))
    (record,) = records(plan, folder)
    assert record.config["train.lr-a"] == plan.config["train.lr-a"] * better


def test_paths_that_start_with_a_dot_are_seen_from_the_plans_folder(tmp_path):
    (tmp_path / "plans").mkdir()
    file = tmp_path / "plans" / "mine.toml"
    file.write_text('[model]\nname = "timm:../m"\n[data]\nname = "./d"\n[lora]\nrank = 4\n')
    tables = read_file(file)
    assert tables["model.name"] == f"timm:{tmp_path / 'm'}"
    assert tables["data.name"] == str(tmp_path / "plans" / "d")
    assert tables["lora.rank"] == 4
    assert tables["compare"] == {"name": "mine"}


def test_paths_of_a_control_are_seen_from_the_plans_folder_too(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[[compare.controls]]\nmethod = "la-lora"\n'
        'config = { model.name = "./m", "lora.rank" = 2 }\n'
        '[[compare.controls]]\nmethod = "rolora"\n',
        "utf-8",
    )
    first, second = read_file(file)["compare"]["controls"]
    assert first["config"] == {"model.name": str(tmp_path / "m"), "lora.rank": 2}
    assert second["config"] == {}


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("method", 'method = "rolora"'),
        ("seed", "seed = 3"),
        (r"privacy\.epsilon", "privacy.epsilon = 1.0"),
    ],
)
def test_what_the_compare_table_overrules_is_refused(tmp_path, key, line):
    file = tmp_path / "mine.toml"
    file.write_text(f"{line}\n", "utf-8")
    read_file(file)  # the preset of a run, compared as it is
    file.write_text(f"{line}\n[compare]\nnodes = 2\n", "utf-8")
    told = rf"^{key}=.* must be left out: compare\.(methods|seeds|epsilons) sets it$"
    with pytest.raises(ConfigError, match=told):
        read_file(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("compare = 3", r"^compare=3 must be a table$"),
        ('method = "la-lora"\ncompare = "none"', r"^compare='none' must be a table$"),
        ('[compare.controls]\nmethod = "la-lora"', r"^compare\.controls=.* must be tables"),
        ('[compare]\ncontrols = ["la-lora"]', r"^compare\.controls='la-lora' must be a table$"),
    ],
)
def test_a_malformed_plan_is_one_line(tmp_path, text, told):
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=told):
        read_file(file)


@pytest.mark.parametrize("content", [None, b"= no toml", b"method = '\xff'"])
def test_a_plan_that_cannot_be_read_is_one_line(tmp_path, content):
    file = tmp_path / "plan.toml"
    if content:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"plan\.toml must be") as caught:
        read_file(file)
    assert "\n" not in str(caught.value)
