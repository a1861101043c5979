"""Rewrite the table of docs/methods.md from METHODS and the shapes of the default run.

python scripts/methods_page.py
"""

import tomllib
from pathlib import Path

import numpy as np

from lalora_app.adapter.factors import Adapter, num_bytes, select
from lalora_app.methods.method import Method
from lalora_app.methods.table import METHODS
from lalora_app.settings.run_config import Config, from_tables, parse
from lalora_app.simulation.traffic import traffic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- table -->", "<!-- end table -->"
WIDTH, TARGETS = 384, 12  # MiniLM-L6: query and value of six layers
HEADER = (
    "| method | local steps train | a round sends | bytes up | bytes down at first | later | exact "
    "| sums suffice | moves the base | mixed ranks | keeps state |"
)


def default_config() -> Config:
    """Return the default run's config."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    return parse(from_tables(app["config"]) | {"data.num-labels": 2})  # ham and spam


def initial(method: Method, config: Config) -> Adapter:
    """Return the method's initial adapter with the shapes of the default run."""
    rank, adapter = method.width(config.lora.rank, config.rule), Adapter()
    for layer in range(TARGETS):
        if method.whole:
            adapter[f"{layer}.lora_W.weight"] = np.zeros((WIDTH, WIDTH), np.float32)
            continue
        adapter[f"{layer}.lora_A.weight"] = np.ones((rank, WIDTH), np.float32)
        adapter[f"{layer}.lora_B.weight"] = np.zeros((WIDTH, rank), np.float32)
    adapter["head.weight"] = np.zeros((config.data.num_labels, WIDTH), np.float32)
    adapter["head.bias"] = np.zeros(config.data.num_labels, np.float32)
    return method.start(adapter, config.rule)


def _turns(first: frozenset[str], second: frozenset[str]) -> str:
    one, two = (" and ".join(sorted(factors)) or "head only" for factors in (first, second))
    return one if one == two else f"{one}, {two} in turn"


def row(name: str, method: Method, config: Config) -> str:
    """Return the line of one method."""
    start = initial(method, config)
    steps = _turns(method.trains(1, 0), method.trains(1, 1))
    if method.trains(1, 0) != method.trains(2, 0):
        steps = _turns(method.trains(1, 0), method.trains(2, 0)) + " by round"
    sends = _turns(method.syncs(1), method.syncs(2))
    if method.finally_syncs - method.syncs(1):
        sends += "; at last " + " and ".join(sorted(method.finally_syncs))
    drift = " + drift" if method.moves_base else ""
    down, later = (
        f"{num_bytes(start):,}{drift}",
        f"{traffic(method, start, config).down[0]:,}{drift}",
    )
    flags = (
        method.exact,
        method.linear,
        method.moves_base,
        method.heterogeneous,
        method.keeps_client_state,
    )
    up = f"{num_bytes(select(start, method.syncs(1))):,}"
    cells = [
        f"`{name}`",
        steps,
        sends,
        up,
        down,
        later,
        *("yes" if flag else "–" for flag in flags),
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """Return the whole table."""
    config = default_config()
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    lines += [row(name, method, config) for name, method in METHODS.items()]
    return "\n".join(lines)


def main() -> None:
    """Replace the text between the markers."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
