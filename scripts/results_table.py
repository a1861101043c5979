"""Copy the main numbers of docs/results.md into the table of README.md.

python scripts/results_table.py
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end results -->"
METHODS = ("dp-lora", "ffa-lora", "rolora", "la-lora", "la-lora-full")
EPSILONS = ("1", "3", "inf")
TITLES = {"sst2-minilm": "SST-2, MiniLM-L6", "tiny-imagenet-swin": "Tiny-ImageNet, small Swin"}


@dataclass(frozen=True)
class Score:
    """One line of a comparison: accuracy in percent, mean and standard deviation over seeds."""

    method: str
    epsilon: str
    mean: float
    spread: float
    upload: str

    def shown(self) -> str:
        """Return mean and standard deviation as text that stays on one line of a table cell."""
        return f"{self.mean:.1f}\u00a0±\u00a0{self.spread:.1f}"


def rows(name: str) -> list[list[str]]:
    """Return the cells of each line of the tables of one comparison on docs/results.md."""
    part = PAGE.read_text("utf-8").split(f"<!-- {name} -->")[1].split(f"<!-- end {name} -->")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in cells] for cells in lines]


def scores(name: str) -> list[Score]:
    """Return the lines of one comparison on docs/results.md, the controls left out."""
    found = []
    for cells in rows(name):
        if cells[0] in METHODS and (m := re.fullmatch(r"([\d.]+) ± ([\d.]+)", cells[3])):
            found.append(Score(cells[0], cells[1], float(m[1]), float(m[2]), cells[6]))
    return found


def table() -> str:
    """Return the table of the README."""
    lines = [
        "| method | data | ε\u00a0=\u00a01 | ε\u00a0=\u00a03 | not\u00a0private | bytes up |",
        "|---" * 6 + "|",
    ]
    for name, title in TITLES.items():
        found = {(score.method, score.epsilon): score for score in scores(name)}
        for method in METHODS:
            row = [found[method, epsilon] for epsilon in EPSILONS]
            shown = " | ".join(score.shown() for score in row)
            data = title.split(",")[0]
            lines.append(f"| `{method}` | {data} | {shown} | {row[0].upload} |")
    return "\n".join(lines)


def main() -> None:
    """Replace the table between the markers."""
    before, rest = README.read_text("utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
