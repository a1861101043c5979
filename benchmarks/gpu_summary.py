"""Print the tables of docs/performance.md and docs/results.md about the measurements on a GPU.

python benchmarks/gpu_summary.py            # of the runs in benchmarks/results/gpu/
python benchmarks/gpu_summary.py FOLDER     # of a run of benchmarks/gpu.py with --out FOLDER
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_parts import tables
from gpu_parts.tables import to_table

RESULTS = Path(__file__).parent / "results" / "gpu"
NAMES = {
    "roberta-base-whole": "RoBERTa-base",
    "swin-tiny-whole": "Swin-tiny",
    "swin-base-whole": "Swin-base",
}
RATES = {"adam 3e-3": "AdamW", "sgd x2, slow decay": "SGD"}
TARGETS = {"query,value": "query, value", "query,key,value,dense": "all Linear layers"}
METHODS = ("la-lora", "rolora", "dp-lora")
CLIENTS = {"sst2-recipe": "4", "sst2-recipe-adamw": "4", "sst2-recipe-20-clients": "20"}
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW, clip norm 10"}
Rows = list[dict[str, Any]]


def _read(name: str) -> Rows:
    rows: Rows = json.loads((RESULTS / name).read_text("utf-8"))
    return rows


def _cells(rows: Rows) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows per (model, phase), by variant."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model in NAMES:
        for phase in ("B", "A"):
            own = [row for row in rows if (row["model"], row["phase"]) == (model, phase)]
            if own:
                found[model, phase] = {row["variant"]: row for row in own}
    return found


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return "fails"
    return f"{row['wall_ratio']:.2f} [{row['wall_least']:.2f}-{row['wall_most']:.2f}]"


def eager_table() -> str:
    """Return the table of eager steps: wall-clock, host and memory ratios to stock PEFT."""
    head = ["model", "phase", "PEFT, ms", "`fused`", "`fused-nonprivate`", "`merged`"]
    head += ["Opacus ghost", "host time of `fused`", "peak memory of `fused`"]

    def lines() -> Iterable[list[str]]:
        for (model, phase), by in _cells(_read("eager.json")).items():
            timed = [_ratio(by[name]) for name in ("fused", "fused-nonprivate", "merged")]
            host, peak = by["fused"]["cpu_ratio"], by["fused"]["peak_ratio"]
            milliseconds = f"{1000 * by['peft']['wall_seconds']:.0f}"
            ghost = _ratio(by.get("opacus-ghost"))
            yield [NAMES[model], phase, milliseconds, *timed, ghost, f"{host:.2f}", f"{peak:.3f}"]

    return to_table(head, lines())


def compiled_table() -> str:
    """Return the table of compiled steps: wall-clock and memory ratios to eager PEFT."""
    head = ["model", "phase", "compiled PEFT", "`compiled`", "`compiled` / compiled PEFT"]
    head += ["peak memory of compiled PEFT", "peak memory of `compiled`"]

    def lines() -> Iterable[list[str]]:
        for (model, phase), by in _cells(_read("compiled.json")).items():
            stock, own = by["peft-compiled"], by["compiled"]
            quotient = f"{own['wall_ratio'] / stock['wall_ratio']:.2f}"
            peaks = [f"{row['peak_ratio']:.2f}" for row in (stock, own)]
            yield [NAMES[model], phase, _ratio(stock), _ratio(own), quotient, *peaks]

    return to_table(head, lines())


def busy_table() -> str:
    """Return the table of the GPU's own time at batch 64, and of whole steps at batch 256."""
    rows = _read("quiet.json")
    head = ["model", "GPU time of PEFT, ms", "`fused`", "`merged`", "`plain`"]
    head += ["batch 256: PEFT, ms", "`fused`", "`merged`"]

    def ratios(part: str, model: str) -> dict[str, dict[str, Any]]:
        own = [row for row in rows if row["part"] == part and row["model"] == model]
        return {row["variant"]: row for row in own}

    def lines() -> Iterable[list[str]]:
        for model in ("roberta-base-whole", "swin-tiny-whole"):
            busy, large = ratios("busy", model), ratios("large", model)
            gpu = [f"{busy[name]['ratio']:.2f}" for name in ("fused", "merged", "plain")]
            wall = [
                f"{large[name]['wall_ratio']:.2f} "
                f"[{large[name]['least']:.2f}-{large[name]['most']:.2f}]"
                for name in ("fused", "merged")
            ]
            peft = [f"{busy['peft']['ms']:.1f}", f"{large['peft']['ms']:.0f}"]
            yield [NAMES[model], peft[0], *gpu, peft[1], *wall]

    return to_table(head, lines())


def study_table() -> str:
    """Return the table of the comparison on SST-2: accuracy in percent, one run per number."""
    text = (RESULTS / "study.jsonl").read_text("utf-8")
    runs: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for run in map(json.loads, text.splitlines()):
        epsilon = run["epsilon"].removesuffix(".0")
        line = (epsilon, TARGETS[run["targets"]], RATES[run["rates"]], run["seed"])
        runs.setdefault(line, {})[run["method"]] = run["accuracy"]
    order = sorted(runs, key=lambda line: (line[0], line[1] != TARGETS["query,value"], *line[2:]))
    lines = (
        [*map(str, line), *(f"{100 * runs[line][method]:.1f}" for method in METHODS)]
        for line in order
    )
    return to_table(["ε", "LoRA on", "optimiser", "seed", *METHODS], lines)


def h200_table() -> str:
    """Return the table of eager steps on an H200."""
    return tables.eager(json.loads((RESULTS / "h200" / "steps.json").read_text("utf-8"))["rows"])


def recipe_table() -> str:
    """Return the finished runs of configs/bench/sst2-recipe*.toml: accuracy in percent."""
    text = (RESULTS / "h200" / "sst2_recipe.jsonl").read_text("utf-8")
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for run in map(json.loads, text.splitlines()):
        method = run["method"] + (", one client" if run["central"] else "")
        optimizer, clients = OPTIMIZERS[run["optimizer"]], CLIENTS[run["plan"]]
        line = (clients, optimizer, run["epsilon"].removesuffix(".0"), method)
        kind = "tuning" if run["cell"].startswith("tuning/") else "test"
        found = lines.setdefault(line, {"tuning": [], "test": []})
        found[kind].append(f"{100 * run['accuracy']:.1f}")
    head = ["clients", "optimiser", "ε", "method", "held-out sentences, rates × 0.5 and × 1.5"]
    rows = ([*line, ", ".join(by["tuning"]), ", ".join(by["test"])] for line, by in lines.items())
    return to_table([*head, "validation, seeds 0 to 2"], rows)


def main() -> None:
    """Print the tables of the published runs, or of one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="results of benchmarks/gpu.py")
    folder = parser.parse_args().folder
    if folder is not None:
        print(tables.page(folder))
        return
    for table in (eager_table, busy_table, compiled_table, h200_table, study_table, recipe_table):
        print(f"{table.__name__}\n{table()}\n")


if __name__ == "__main__":
    main()
