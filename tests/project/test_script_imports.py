"""Names that benchmarks and scripts import from the app: no test runs all of them."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from conftest import ROOT

FILES = sorted(
    path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")
)


def imported(path: Path) -> list[tuple[str, str]]:
    """Return (module, name) of every import of a file from the app."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0]
    return [
        (node.module, alias.name)
        for node in imports
        if node.module and node.module.split(".")[0] == "lalora_app"
        for alias in node.names
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_name_is_there(path):
    for module, name in imported(path):
        found = import_module(module)
        assert hasattr(found, name) or import_module(f"{module}.{name}"), (module, name)


def test_a_module_that_is_gone_is_noticed(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from lalora_app.cli.simulation import app_defaults\n", "utf-8")
    with pytest.raises(ModuleNotFoundError, match=r"lalora_app\.cli\.simulation"):
        test_every_name_is_there(file)
