"""README.md and docs/: every command parses; every key, path, name and link exists."""

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from conftest import ROOT, defaults
from helpers.documents import DOCUMENTS, commands, inline
from lalora_app.cli.main import _parser
from lalora_app.client.own_data import _COLUMNS, _FORMAT, _LABELS, _TASKS
from lalora_app.comparison.plan_file import _DEFAULTS, _TUNE
from lalora_app.privacy import shared_policy
from lalora_app.privacy.policy import _KEYS
from lalora_app.server.strategy import Attempt
from lalora_app.simulation import launch

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
EXAMPLE = "lalora_app/aggregation/forget.py"  # CONTRIBUTING tells the reader to write it
NUMBERS = {"E": "1"}  # letters that stand for a number in a command
OTHER_NAMES = {"privacy.json", "train.secagg"}
OTHER_NAMES |= {"server.key", "server.pem"}  # files of a TLS server
FLOWER_SETS = {"partition-id", "num-partitions"}  # keys of a node config in simulation


def expanded(word: str) -> str:
    """A word with the default of ${NAME:-default} and of $NAME as the guide sets them."""
    guide = {"REHEARSAL": "configs/deployment/rehearsal.toml"}
    guide["FIRST_RUN"] = "configs/deployment/mixed-ranks.toml"
    return re.sub(r"\$(\w+)", lambda m: guide.get(m[1], m[0]), word)


def overrides(argv: list[str]) -> list[str]:
    """The values of -c; files that only a reader has are left out."""
    values = [expanded(after) for word, after in pairwise(argv) if word == "-c"]
    return [v for v in values if "=" in v or (ROOT / v).is_file()]


@each_document
def test_every_lalora_command_is_one_that_the_parser_takes(path):
    for argv in commands(path, "lalora"):
        if argv[1:] and not is_a_name(argv):
            _parser().parse_args([NUMBERS.get(word, word) for word in argv[1:]])


def is_a_name(argv: list[str]) -> bool:
    """Prose names a command by its words alone, such as `lalora ledger merge`."""
    return len(argv) <= 3 and all(word.isalpha() and word.islower() for word in argv)


@each_document
def test_a_command_that_is_only_named_exists(path):
    for argv in commands(path, "lalora"):
        if argv[1:] and is_a_name(argv):
            with pytest.raises(SystemExit) as ended:
                _parser().parse_args([*argv[1:], "--help"])
            assert ended.value.code == 0, argv


@each_document
def test_every_override_is_a_run_that_could_start(path, monkeypatch):
    monkeypatch.setattr(launch, "resumed_config", lambda own: ({}, None))  # of no real folder
    for argv in [*commands(path, "lalora run"), *commands(path, "flwr run")]:
        found = overrides(argv)
        if found and 'method="forgetful"' not in found:  # CONTRIBUTING's example adds this one
            assert launch.read_launch(ROOT, found, None).values, argv


@each_document
def test_every_plan_that_is_named_exists(path):
    for argv in commands(path, "lalora compare"):
        plans = [word for word in argv if word.endswith(".toml")]
        assert all((ROOT / plan).is_file() for plan in plans), argv


@each_document
def test_every_script_and_every_target_of_make_exists(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for argv in commands(path, "python"):
        assert (ROOT / argv[1]).is_file(), argv
    for argv in commands(path, "make"):
        assert {word for word in argv[1:] if "=" not in word} <= set(targets), argv


@pytest.mark.slow
@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode"])
def test_every_option_of_flowers_programs_exists(program):
    found = [argv for path in DOCUMENTS for argv in commands(path, program)]
    known = subprocess.run(
        [Path(sys.executable).parent / program, "--help"],
        env=os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found
    for argv in found:
        options = {word for word in argv if word.startswith("--")}
        assert {option for option in options if option not in known} == set(), argv


@each_document
def test_every_config_key_that_is_named_exists(path):
    section = r"(?:model|lora|data|privacy|train|rule|server)\.[a-z][a-z-]*"
    for code in inline(path):
        for key in re.findall(rf"(?:^|[\s\"'])({section})(?=$|[\s=,:])", code):
            assert key in {*defaults(), *OTHER_NAMES}, f"{path.name}: {key}"


def keys_read_by(folder: str, names: set[str]) -> set[str]:
    """String keys that a room reads from one of the named mappings, found in its source."""
    found = set()
    for path in (ROOT / "lalora_app" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))):
                    found |= {key} if name in names else set()
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id=name), attr="get"),
                    args=[ast.Constant(value=str(key)), *_],
                ):
                    found |= {key} if name in names else set()
                case ast.Compare(
                    left=ast.Constant(value=str(key)), comparators=[ast.Name(id=name), *_]
                ):
                    found |= {key} if name in names else set()
    return found


def first_cells(path: Path, heading: str) -> set[str]:
    """Code words in the first column of the table below a heading."""
    part = path.read_text("utf-8").split(heading)[1].split("\n#")[0]
    cells = [row.split("|")[1] for row in part.splitlines() if row.startswith("| ")]
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_the_page_of_the_node_config_has_every_key_that_is_read():
    found = first_cells(ROOT / "docs" / "node-config.md", "# Configuration of a site")
    mapping = {"node", "node_config"}
    rooms = ("client", "privacy", "site_worker")
    known = set().union(*(keys_read_by(room, mapping) for room in rooms))
    columns = {*_COLUMNS, *_TASKS, *_LABELS, *_FORMAT}
    limits = {"max-epsilon", "delta", "public-size"}
    assert found == (known | columns | limits) - FLOWER_SETS


def test_the_page_of_the_node_config_has_every_key_of_a_policy():
    found = first_cells(ROOT / "docs" / "node-config.md", "## Policy file")
    tables = {'[datasets."ID"]', "[shared-noise]"}
    assert found - tables == set(_KEYS) - {"datasets", "shared-noise"}
    shared = first_cells(ROOT / "docs" / "node-config.md", "### Conditions for shared noise")
    assert shared == set(shared_policy._KEYS)


def test_every_node_config_in_a_command_uses_keys_of_the_page():
    page = ROOT / "docs" / "node-config.md"
    known = first_cells(page, "# Configuration of a site") | FLOWER_SETS
    for path in DOCUMENTS:
        for argv in commands(path, "flower-supernode"):
            if "--node-config" in argv:
                text = argv[argv.index("--node-config") + 1]
                assert set(re.findall(r"([\w-]+)=", text)) <= known, path.name


def test_the_page_of_a_runs_folder_has_every_key_of_the_history():
    found = first_cells(ROOT / "docs" / "run-folder.md", "## Keys of the history")
    scores = {"accuracy", "balanced_accuracy"}
    of_some_runs = {"task", "task_accuracy", "lowered_ranks"}
    always = {"attempt", "elapsed"}
    assert found == set(Attempt.__dataclass_fields__) | scores | always | of_some_runs


def test_the_page_of_comparisons_has_every_key_of_a_plan():
    found = first_cells(ROOT / "docs" / "comparisons.md", "# Comparisons")
    plain = {f"compare.{key}" for key in set(_DEFAULTS) - {"controls", "tune"}}
    assert found == plain | {f"compare.tune.{key}" for key in _TUNE} | {"[[compare.controls]]"}


@each_document
def test_every_path_that_is_named_exists(path):
    folders = "lalora_app|tests|scripts|benchmarks|configs|docs|examples|deploy"
    text = path.read_text("utf-8")
    for name in set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./@-]*\w)", text)):
        assert (ROOT / name).exists() or name == EXAMPLE, f"{path.name}: {name}"


@each_document
def test_every_name_that_follows_a_path_is_defined_there(path):
    pairs = re.findall(r"`(lalora_app/[\w/]+\.py)`\s+`(\w+)`", path.read_text("utf-8"))
    for file, name in pairs:
        source = (ROOT / file).read_text("utf-8")
        assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", source, re.M), (file, name)


@each_document
def test_every_test_that_is_named_exists(path):
    sources = {p.name: p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py")}
    for code in inline(path):
        for file, name in re.findall(r"(test_\w+\.py)?(?:::)?(test_\w+…)?", code):
            assert not file or file in sources, f"{path.name}: {file}"
            places = [sources[file]] if file else sources.values()
            start = f"def {name.rstrip('…')}" if name else ""
            assert any(start in place for place in places), f"{path.name}: {name}"


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_every_link_leads_somewhere(path):
    text = path.read_text("utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    for target in targets:
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{path.name}: {target}"


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.stem)
def test_the_command_in_a_presets_comment_is_for_this_preset(preset):
    comment = " ".join(re.findall(r"^# ?(.*)$", preset.read_text("utf-8"), re.M))
    for argv in re.findall(r"lalora compare (\S+(?: --\S+ \S+)*)", comment):
        args = _parser().parse_args(["compare", *argv.split()])
        assert ROOT / args.plan == preset
