"""The direction of imports and the size of modules and functions, read from the source itself."""

import ast
import importlib.util
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "lalora_app"
USES_FLWR = {
    *("robust", "tensors", "wire", "downlink", "strategy", "client_app", "server_app"),
    *("runlog", "comparison"),
    *("secagg.masks", "secagg.records", "secagg.client", "secagg.session", "secagg.strategy"),
}
SHELL = USES_FLWR | {"cli", "books", "launcher", "compare", "overrides"}
TORCH_ROOMS = {
    "trainer",
    "backbone",
    "models",
    "models.base",
    "models.pretrained",
    "models.timm_models",
    "models.transformers_models",
    "tasks",
    "encoding",
    "images",
    "privacy.per_example",
    "privacy.attach",
    "privacy.expanded",
    "device",
    "privacy.kernels",
    "privacy.layout",
    "privacy.tape",
    "privacy.pullback",
    "privacy.mechanism",
    "bases",
    "calibrate",
    "diagnose",
    "export",
    "curvature",
    "audit.canaries",
    "audit.step",
    "audit.broken",
    "audit.federation",
    "audit.shares",
    "audit.run",
    "audit.audit",
}
CORE = {
    "schedule",
    "adapter",
    "aggregate",
    "aggregate.mean",
    "aggregate.rule",
    "aggregate.products",
    "aggregate.refactor",
    "aggregate.residual",
    "aggregate.fold",
    "aggregate.padded",
    "aggregate.align",
    "aggregate.tasks",
    "filters",
    "optimizers",
    "parametrise",
    "perturb",
    "method",
    "methods",
    "laws",
    "config",
    "privacy.types",
    "privacy.accounting",
    "privacy.budget",
    "privacy.ledger",
    "privacy.policy",
    "privacy.randomness",
    "aggregate.error",
    "plan",
    "plan_tables",
    "finished",
    "records",
    "tables",
    "drawing",
    "plots",
    "report",
    "report_template",
    "cohorts",
    "data",
    "partition",
    "replies",
    "whole_files",
    "residents",
    "site",
    "sources",
    "diagnostics",
    "audit",
    "audit.estimators",
    "audit.published",
    "audit.publish",
    "audit.report",
    "roc",
    "credentials",
    "secagg",
    "secagg.fixed_point",
    "secagg.laws",
}


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


def test_every_named_module_exists():
    assert set(TREES) >= USES_FLWR | SHELL | TORCH_ROOMS | CORE


def test_only_the_shell_imports_flwr():
    importers = {
        name
        for name, tree in TREES.items()
        if any(found.split(".")[0] == "flwr" for found in imported(ast.walk(tree)))
    }
    assert importers == USES_FLWR


@pytest.mark.parametrize("module", sorted(CORE))
def test_core_reaches_no_torch_room_and_no_shell(module):
    assert not reachable(ALL_IMPORTS, module) & (TORCH_ROOMS | SHELL)


@pytest.mark.parametrize("module", sorted(TORCH_ROOMS))
def test_torch_rooms_reach_no_shell(module):
    assert not reachable(ALL_IMPORTS, module) & SHELL


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


def test_shell_modules_import_each_other_in_one_order():
    # wire -> strategy -> runlog -> server_app: each may use those before it, none after it.
    order = ["wire", "strategy", "runlog", "server_app"]
    for lower, upper in pairwise(order):
        assert upper not in reachable(ALL_IMPORTS, lower)
