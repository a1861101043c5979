"""Measure length and nesting of all functions of the package, from the source code.

python scripts/shape.py
"""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lalora_app"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield every function of a module, including inner functions."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield node


def length(function: ast.FunctionDef) -> int:
    """Return the number of lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    lines = function.end_lineno - function.lineno + 1
    if docstring is None:
        return lines
    first = function.body[0]
    return lines - (first.end_lineno - first.lineno + 1)


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements below a node; an elif is not an additional level."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS):
            yield child


def depth(node: ast.AST) -> int:
    """Return the largest nesting depth of blocks in a function."""
    deepest = 0
    for child in _inner(node):
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        level = isinstance(child, BLOCKS) and not chained
        deepest = max(deepest, level + depth(child))
    return deepest


def measured() -> dict[str, tuple[int, int]]:
    """Return (lines, nesting) of every function, by module and name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in functions(ast.parse(path.read_text("utf-8"))):
            place = f"{path.relative_to(PACKAGE)}:{function.lineno} {function.name}"
            found[place] = length(function), depth(function)
    return found


def main() -> None:
    """Print median and 90 % quantile, the longest and deepest functions, and the longest module."""
    found = measured()
    lines = sorted(size for size, _ in found.values())
    print(
        f"{len(lines)} functions, median {statistics.median(lines):g} lines, "
        f"p90 {lines[int(0.9 * len(lines))]}, longest {lines[-1]}"
    )
    print(f"deepest nesting {max(depth for _, depth in found.values())}")
    for place, (size, nesting) in found.items():
        if nesting > 2 or size == lines[-1]:
            print(f"  {place}: {size} lines, nesting {nesting}")
    modules = {p: len(p.read_text("utf-8").splitlines()) for p in PACKAGE.rglob("*.py")}
    largest = max(modules, key=lambda path: modules[path])
    print(
        f"longest module {largest.relative_to(PACKAGE)}, {modules[largest]} lines; "
        "imports: tests/project/test_layers.py"
    )


if __name__ == "__main__":
    main()
