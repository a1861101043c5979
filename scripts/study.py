"""The README's table: methods at ε = 3 and la-lora at ε = inf, three seeds, one run after another.

Resumable: a run whose summary is in the output folder is not run again. Usage:
python scripts/study.py [--output FOLDER]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

APP = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
RUNS = [
    *((method, "3.0") for method in ("la-lora", "la-lora-full", "rolora", "ffa-lora", "dp-lora")),
    ("la-lora", "inf"),
]


def find(folder: Path) -> dict | None:
    """Return the summary of the completed run in ``folder``, if there is one."""
    for path in folder.glob("*/summary.json"):
        summary = json.loads(path.read_text("utf-8"))
        if summary["status"] == "completed":
            return summary
    return None


def run(method: str, epsilon: str, seed: int, folder: Path) -> dict:
    """Run one configuration, unless its summary is there."""
    if (done := find(folder)) is not None:
        return done
    pairs = f'method="{method}" privacy.epsilon={epsilon} seed={seed} output="{folder}"'
    subprocess.run(
        [sys.executable, "-m", "lalora_app.cli", "run", str(APP), "-c", pairs], check=True
    )
    summary = find(folder)
    if summary is None:
        raise RuntimeError(f"{folder} holds no completed run")
    return summary


def cell(values: list[float]) -> str:
    """Return mean ± standard deviation in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("~/lalora-results/study"))
    output = parser.parse_args().output.expanduser().resolve()
    lines = []
    for seed in SEEDS:  # seed by seed, so that an interrupted study is a smaller study
        for method, epsilon in RUNS:
            run(method, epsilon, seed, output / f"{method}-eps{epsilon}-seed{seed}")
    for method, epsilon in RUNS:
        folders = [output / f"{method}-eps{epsilon}-seed{seed}" for seed in SEEDS]
        found = [summary for folder in folders if (summary := find(folder))]
        accuracy = cell([row["accuracy"] for row in found])
        balanced = cell([row["balanced_accuracy"] for row in found])
        up, down = found[0]["upload_bytes_per_round"], found[0]["download_bytes_per_round"]
        seconds = statistics.median(row["seconds"] for row in found)
        spent = max(float(row["epsilon_max"]) for row in found)
        lines.append(
            f"| `{method}` | {epsilon} | {accuracy} | {balanced} | {spent:.2f} | {up:,} | "
            f"{down:,} | {seconds:.0f} |"
        )
    print("| method | ε | accuracy % | balanced % | ε spent | bytes up | bytes down | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
