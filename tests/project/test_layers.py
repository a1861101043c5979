"""The direction of imports and the size of modules and functions, read from the source itself."""

import ast
import importlib.util
import re
import statistics
import sys
from pathlib import Path

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import pictures

PACKAGE = ROOT / "lalora_app"
# A folder or top module may import only those on a lower line, or its own modules.
LINES = {
    "cli": 13,
    "simulation": 12,
    "server_app": 11,
    "audit": 10,
    "comparison": 9,
    "diagnosis": 9,
    "server": 9,
    "reports": 8,
    "workers": 10,
    "client_app": 9,
    "site_worker": 8,
    "client": 7,
    "results": 7,
    "models": 6,
    "site_files": 6,
    "methods": 5,
    "secagg": 5,
    "blocks": 5,
    "server_state": 5,
    "private_step": 4,
    "aggregation": 3,
    "wire": 3,
    "shared_noise": 3,
    "adapter": 2,
    "privacy": 2,
    "data": 2,
    "settings": 1,
}
USES_FLWR = {"wire", "secagg", "client", "server", "client_app", "server_app", "comparison"}
USES_FLWR |= {"workers", "site_files", "site_worker"}
NO_TORCH = {"settings", "privacy", "wire", "aggregation", "reports", "comparison", "cli"}
NO_TORCH |= {"simulation", "site_worker", "server_state", "shared_noise"}
MODULES_PER_FOLDER, LINES_PER_MODULE = 12, 300
TOP = {"__init__.py", "client_app.py", "server_app.py"}


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(package: Path) -> dict[str, ast.Module]:
    paths = sorted(package.rglob("*.py"))
    return {module_name(path, package): ast.parse(path.read_text("utf-8")) for path in paths}


def at_module_level(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_module_level(child)


def imported(nodes) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def internal(names: set[str], known: set[str], package: str = "lalora_app") -> set[str]:
    local = {name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")}
    return local & known


def import_graph(trees: dict[str, ast.Module], *, lazy: bool) -> dict[str, set[str]]:
    nodes = ast.walk if lazy else at_module_level
    return {name: internal(imported(nodes(tree)), set(trees)) for name, tree in trees.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


TREES = sources(PACKAGE)
ALL_IMPORTS = import_graph(TREES, lazy=True)


def place(module: str) -> str:
    """The folder of a module, or the module itself at the top of the package."""
    return module.split(".")[0]


def wrong_imports(graph: dict[str, set[str]], lines: dict[str, int]) -> list[str]:
    """Imports of another folder that do not go down."""
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if module and other and place(module) != place(other)
        if lines[place(module)] <= lines[place(other)]
    )


def test_every_folder_and_top_module_has_a_line():
    assert {place(module) for module in TREES if module} == set(LINES)


def test_imports_between_folders_go_down():
    assert wrong_imports(ALL_IMPORTS, LINES) == []


def test_the_picture_and_the_page_of_the_architecture_have_these_levels():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `([\w]+?)(?:/|\.py)` \|", page, re.M)
    drawn = [(level, name) for level, names in pictures.LEVELS for name in names]
    expected = sorted((str(level), name) for name, level in LINES.items())
    assert sorted(rows) == expected
    assert sorted((level, name.removesuffix(".py")) for level, name in drawn) == expected


def test_an_import_that_goes_up_and_one_that_goes_across_are_found():
    graph = {"a.x": {"b.y"}, "b.y": {"a.x"}, "c": {"a.x", "b.y"}, "a.z": {"a.x"}}
    assert wrong_imports(graph, {"a": 2, "b": 2, "c": 3}) == ["a.x imports b.y", "b.y imports a.x"]
    assert wrong_imports(graph, {"a": 1, "b": 2, "c": 3}) == ["a.x imports b.y"]


def test_only_the_rooms_of_messages_import_flwr():
    importers = {
        place(name)
        for name, tree in TREES.items()
        if any(found.split(".")[0] == "flwr" for found in imported(ast.walk(tree)))
    }
    assert importers == USES_FLWR
    (runner,) = [m for m in TREES if place(m) == "comparison" and uses(TREES[m], "flwr")]
    assert runner == "comparison.runner"


def uses(tree: ast.Module, library: str) -> bool:
    return any(found.split(".")[0] == library for found in imported(ast.walk(tree)))


@pytest.mark.parametrize("folder", sorted(NO_TORCH))
def test_rooms_without_torch_do_not_import_it(folder):
    inside = [name for name in TREES if place(name) == folder]
    assert [name for name in inside if uses(TREES[name], "torch")] == []


def test_the_top_holds_the_two_apps_and_the_assets():
    assert {path.name for path in PACKAGE.glob("*.py")} == TOP
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {place(module) for module in TREES if "." in module} | {"assets"}


def test_no_folder_has_too_many_modules():
    sizes = {f.name: len(list(f.glob("*.py"))) - 1 for f in PACKAGE.iterdir() if f.is_dir()}
    assert {name: size for name, size in sizes.items() if size > MODULES_PER_FOLDER} == {}


def test_every_folder_says_what_it_is_for():
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
            assert text, folder
            assert "In" in text, folder
            assert "ut: " in text, folder


def test_no_module_takes_part_in_an_import_cycle():
    graph = import_graph(TREES, lazy=False)
    assert [name for name in graph if name in reachable(graph, name)] == []


def test_a_planted_cycle_and_a_lazy_import_are_told_apart(tmp_path):
    (tmp_path / "a.py").write_text("from lalora_app.b import x\n")
    (tmp_path / "b.py").write_text("if True:\n    import lalora_app.a\n")
    (tmp_path / "c.py").write_text("def f():\n    from lalora_app import a\n")
    trees = sources(tmp_path)
    eager, lazy = import_graph(trees, lazy=False), import_graph(trees, lazy=True)
    assert reachable(eager, "a") == {"a", "b"}
    assert (eager["c"], lazy["c"]) == (set(), {"a"})


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_modules_stay_below_300_lines_and_functions_within_60(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 300
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []


def test_functions_are_short_and_shallow():
    """The design's bounds: median 12 lines without docstrings, nine in ten 35, nesting 2."""
    spec = importlib.util.spec_from_file_location("shape", ROOT / "scripts" / "shape.py")
    shape = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shape)
    found = shape.measured()
    sizes = sorted(size for size, _ in found.values())
    assert statistics.median(sizes) <= 12
    assert sizes[int(0.9 * len(sizes))] <= 35
    assert [place for place, (_, nesting) in found.items() if nesting > 2] == []
    nested = "def f():\n for x in y:\n  if x:\n   with x:\n    pass\n  elif y:\n   pass\n"
    (function,) = shape.functions(ast.parse(nested))
    assert (shape.length(function), shape.depth(function)) == (7, 3)
