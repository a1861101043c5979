"""The example method in CONTRIBUTING.md works, and the median method is not longer."""

import ast
import inspect
import re
import statistics
from dataclasses import fields, replace

import numpy as np

from conftest import ROOT, make_config
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.methods import table as methods_table
from lalora_app.methods.method import Method
from lalora_app.methods.table import METHODS

LONGEST = 40
DEFAULTS = {field.name: field.default for field in fields(Method)}


def example() -> tuple[str, str]:
    """Return the example's module and its line of METHODS."""
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S
    )
    module, entry = block.split("# lalora_app/methods/table.py, in METHODS\n")
    return module, entry


def code_lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def test_the_example_is_short():
    assert code_lines("".join(example())) <= LONGEST


def test_the_example_works_as_written():
    module, entry = example()
    space: dict = {}
    exec(compile(module, "forget.py", "exec"), space)
    names = {"replace": replace, "_BOTH": methods_table._BOTH, "forget": type("module", (), space)}
    names["forget"].forgetful = staticmethod(space["forgetful"])
    added = eval("{" + entry + "}", names)["forgetful"]
    rng = np.random.default_rng(0)
    start = {n: rng.standard_normal((2, 2)).astype("f4") for n in ("l.lora_A.w", "l.lora_B.w", "h")}
    info = RoundInfo(t=1, rounds=1, seed=0, numbers=make_config().rule)
    new = added.aggregate(start, [1.0], [start], info).adapter
    assert np.allclose(new["l.lora_A.w"], 0.9 * start["l.lora_A.w"])
    assert np.array_equal(new["h"], start["h"])


def entry_lines() -> dict[str, int]:
    """Return the number of lines per value of METHODS."""
    tree = ast.parse(inspect.getsource(methods_table))
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and node.target.id == "METHODS"
    ]
    return {
        key.value: value.end_lineno - value.lineno + 1
        for key, value in zip(table.keys, table.values, strict=True)
    }


def own_functions(method: Method) -> set:
    """Return the functions that only this method uses, without defaults and shared filters."""
    values = [getattr(method, name) for name in DEFAULTS if getattr(method, name) != DEFAULTS[name]]
    return {value for value in values if inspect.isfunction(value)}


def test_the_median_method_is_no_longer_than_the_example():
    lines, seen, sizes = entry_lines(), set(), {}
    assert set(lines) == set(METHODS)
    for name, method in METHODS.items():
        new = own_functions(method) - seen  # a function counts for the first method that uses it
        seen |= new
        sizes[name] = lines[name] + sum(code_lines(inspect.getsource(f)) for f in new)
    assert statistics.median(sizes.values()) <= LONGEST, sizes
    assert max(sizes.values()) <= 3 * LONGEST, sizes
