"""Rewrite the table of docs/planning.md from the accountant; its picture is drawn from the table.

python scripts/planning_page.py && python scripts/pictures.py
"""

from dataclasses import dataclass
from pathlib import Path

from lalora_app.privacy.planning import Choice, Given, choice

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- table -->", "<!-- end table -->"
HEADER = "| epochs | steps | batch | z | own noise | shared |"
EXAMPLES, CLIENTS, EPSILON, DELTA = 16_800, 4, 1.0, 1e-5
EPOCHS = (1, 3, 10)
STEPS = (40, 80, 160, 320, 640)


@dataclass(frozen=True)
class Row:
    """A line of the table: noise over signal of one entry, at a number of epochs and steps."""

    epochs: int
    steps: int
    own: float


def planned(epochs: int, steps: int) -> Choice:
    """Return the choice that spends this number of epochs in this number of steps."""
    given = Given(
        examples=EXAMPLES, clients=CLIENTS, per_round=CLIENTS, epsilon=EPSILON, delta=DELTA
    )
    return choice(given, epochs * EXAMPLES // steps, 4, steps // 4)


def line(epochs: int, steps: int) -> str:
    """Return one line of the table, as computed now."""
    found = planned(epochs, steps)
    noise = f"{found.noise_multiplier:.3f} | {found.own_noise:.2e} | {found.shared_noise:.2e}"
    return f"| {epochs} | {steps} | {found.batch_size:,} | {noise} |"


def table() -> str:
    """Return the whole table, as computed now."""
    head = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    return "\n".join([*head, *(line(epochs, steps) for epochs in EPOCHS for steps in STEPS)])


def written() -> list[str]:
    """Return the lines of the table on the page."""
    part = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    return part.strip().splitlines()[2:]


def rows() -> list[Row]:
    """Return the numbers of the table on the page."""
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in written()]
    return [Row(int(epochs), int(steps), float(own)) for epochs, steps, _, _, own, _ in cells]


def main() -> None:
    """Replace the text between the markers."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
