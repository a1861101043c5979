"""Print the table of docs/performance.md from the file of results: python benchmarks/summary.py."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "private_step.json"
COLUMNS = ("fused-nonprivate", "fused", "merged", "plain", "opacus-hooks", "opacus-ghost", "vmap")


def _cells(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["phase"], row["batch"]), {})[row["variant"]] = row
    return cells


def _ratio(row: dict | None, key: str) -> str:
    return "–" if row is None or row[key] is None else f"{row[key]:.2f}"


def table(rows: list[dict]) -> str:
    """Return CPU time per variant and the counts of ``fused``, as ratios to stock PEFT."""
    counts = ("flops_ratio", "kernel_ratio", "saved_ratio", "peak_ratio")
    heads = [*COLUMNS, *(f"fused {count.removesuffix('_ratio')}" for count in counts)]
    lines = [f"| model | phase | batch | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for (model, phase, batch), found in sorted(_cells(rows).items()):
        times = [_ratio(found.get(name), "cpu_ratio") for name in COLUMNS]
        exact = [_ratio(found["fused"], count) for count in counts]
        lines.append(f"| {model} | {phase} | {batch} | {' | '.join([*times, *exact])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(RESULTS.read_text("utf-8"))))
