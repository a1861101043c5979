"""Draw the pictures of README.md, docs/architecture.md and docs/planning.md, light and dark.

python scripts/pictures.py
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import log2, log10
from pathlib import Path

from planning_page import CLIENTS, EPOCHS, EPSILON, EXAMPLES, STEPS, rows
from results_table import EPSILONS, METHODS, TITLES, Score, scores

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH = 460  # of every picture, so that 13 px letters stay readable on a 390 px screen
Theme = Mapping[str, str]
MARKS = {  # of the methods, on a light and on a dark page
    "light": ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf8700"),
    "dark": ("#4493f8", "#f0883e", "#3fb950", "#ab7df8", "#d29922"),
}
THEMES: Mapping[str, Theme] = {
    "light": {
        "name": "light",
        "text": "#1f2328",
        "muted": "#59636e",
        "line": "#818b98",
        "fill": "#f6f8fa",
        "page": "#ffffff",
        "noise": "#bc4c00",
        "safe": "#0969da",
        "grid": "#d1d9e0",
    },
    "dark": {
        "name": "dark",
        "text": "#f0f6fc",
        "muted": "#9198a1",
        "line": "#656c76",
        "fill": "#151b23",
        "page": "#0d1117",
        "noise": "#f0883e",
        "safe": "#4493f8",
        "grid": "#3d444d",
    },
}
LEVELS: Sequence[tuple[str, Sequence[str]]] = (
    ("13", ("cli",)),
    ("12", ("simulation",)),
    ("11", ("server_app.py",)),
    ("10", ("audit", "workers")),
    ("9", ("comparison", "diagnosis", "server", "client_app.py")),
    ("8", ("reports", "site_worker")),
    ("7", ("client", "results")),
    ("6", ("models", "site_files")),
    ("5", ("methods", "secagg", "blocks", "server_state")),
    ("4", ("private_step",)),
    ("3", ("aggregation", "wire", "shared_noise")),
    ("2", ("adapter", "privacy", "data")),
    ("1", ("settings",)),
)
# Folders that one private record passes, in this order; the last four hold noised numbers only.
PATH = {"data": "1", "client": "2", "private_step": "3", "wire": "4", "server": "5", "results": "6"}


def text(x: float, y: float, words: str, color: str, *, size: int = 13, more: str = "") -> str:
    """Return a line of text; ``more`` holds further attributes."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" {more}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    """Return a box with round corners."""
    size = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {size} rx="6" fill="{fill}" stroke="{line}" stroke-width="1.3"/>'


def arrow(x: float, start: float, end: float, color: str) -> str:
    """Return a vertical arrow."""
    tip = end - 7 if end > start else end + 7
    head = f"M{x - 5},{tip} L{x},{end} L{x + 5},{tip}"
    path = f"M{x},{start} L{x},{end} {head}"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def centered(
    x: float, y: float, words: str, color: str, *, size: int = 13, bold: bool = False
) -> str:
    """Return a line of text whose middle is at ``x``."""
    weight = ' font-weight="600"' if bold else ""
    return text(x, y, words, color, size=size, more=f'text-anchor="middle"{weight}')


def _site(theme: Theme) -> list[str]:
    """Return the box of a site, with the steps from examples to noised factors."""
    ink, line = theme["text"], theme["line"]
    parts = [box(14 - 5 * i, 16 - 5 * i, 440, 178, theme["fill"], line) for i in (0, 1)][::-1]
    parts.append(text(26, 40, "Site 1 … n", ink, more='font-weight="600"'))
    parts.append(text(26, 59, "Trained: LoRA factors A and B, head. Frozen: base model.", ink))
    steps = (("private", "examples"), ("one gradient", "per example"), ("clip each", "to norm C"))
    for i, (first, second) in enumerate(steps):
        left = 26 + 104 * i
        parts += [box(left, 74, 92, 44, theme["page"], line)]
        parts += [centered(left + 46, 92, first, ink), centered(left + 46, 109, second, ink)]
        parts.append(centered(left + 98, 101, "›", ink, size=16))
    parts.append(box(338, 74, 104, 44, theme["page"], theme["noise"]))
    parts.append(centered(390, 92, "sum + Gaussian", theme["noise"], size=12, bold=True))
    parts.append(centered(390, 109, "noise", theme["noise"], size=12, bold=True))
    parts.append(text(26, 143, "Ledger on disk: ε is counted before the noise is drawn.", ink))
    parts.append(text(26, 162, "A request above the site’s limit is refused, at no cost.", ink))
    parts.append(text(26, 181, "Examples, raw gradients and losses never leave the site.", ink))
    return parts


def _receiver(theme: Theme, place: tuple[int, int, int], name: str, role: str) -> list[str]:
    """Return the box of someone who sees what sites send; ``place``: left, top, width."""
    left, top, width = place
    return [
        box(left, top, width, 82, theme["fill"], theme["line"]),
        text(left + 12, top + 23, name, theme["text"], more='font-weight="600"'),
        text(left + 12, top + 45, role, theme["text"]),
        text(left + 12, top + 67, "ε holds against them", theme["safe"]),
    ]


def guarantee(theme: Theme) -> tuple[int, str, list[str]]:
    """Return height, description and shapes of the picture of the guarantee."""
    ink, line, safe = theme["text"], theme["line"], theme["safe"]
    parts = _site(theme)
    dash = f'stroke="{safe}" stroke-width="1.6" stroke-dasharray="6 4"'
    parts.append(f'<line x1="4" y1="212" x2="456" y2="212" {dash}/>')
    words = "Each number below this line is (ε, δ)-private per example"
    parts.append(centered(230, 232, words, safe, bold=True))
    parts += [arrow(24, 196, 292, line), arrow(436, 292, 196, line)]
    parts.append(text(34, 257, "up: noised factor A or B,", ink))
    parts.append(text(34, 275, "noised head, ε spent", ink))
    parts.append(text(426, 257, "down: averaged", ink, more='text-anchor="end"'))
    parts.append(text(426, 275, "factors and head", ink, more='text-anchor="end"'))
    parts += _receiver(theme, (14, 294, 432), "Server", "checks and averages the uploads")
    parts += [arrow(120, 377, 404, line), arrow(340, 377, 404, line)]
    parts += _receiver(theme, (14, 406, 210), "Other sites", "get averaged factors")
    parts += _receiver(theme, (236, 406, 210), "User of the adapter", "loads it with PEFT")
    about = (
        "Each site trains LoRA factors on its own examples. It clips the gradient of every "
        "example, sums, and adds Gaussian noise. Only noised factors travel to the server, which "
        "averages them. The guarantee holds against the server, the other sites and the users of "
        "the adapter."
    )
    return 496, about, parts


def folders(theme: Theme) -> tuple[int, str, list[str]]:
    """Return height, description and shapes of the picture of the folders."""
    parts = []
    for row, (number, names) in enumerate(LEVELS):
        top = 10 + 46 * row
        parts.append(text(4, top + 22, number, theme["muted"]))
        width = (424 - 8 * (len(names) - 1)) / len(names)
        for i, name in enumerate(names):
            left, step = 28 + i * (width + 8), PATH.get(name)
            noise = name == "private_step"
            line = theme["noise"] if noise else theme["safe"] if step else theme["line"]
            parts.append(box(round(left, 1), top, round(width, 1), 34, theme["fill"], line))
            label = name if name.endswith(".py") else f"{name}/"
            parts.append(centered(round(left + width / 2, 1), top + 22, label, theme["text"]))
            if step:
                parts.append(f'<circle cx="{left + 14:.1f}" cy="{top + 17}" r="9" fill="{line}"/>')
                parts.append(centered(round(left + 14, 1), top + 21, step, theme["page"], size=12))
    end = 10 + 46 * len(LEVELS)
    below = ("A folder imports only folders on lower levels.",)
    below += ("1–6: one private record. Noise is added at 3.",)
    parts += [text(28, end + 16 + 19 * i, line, theme["muted"]) for i, line in enumerate(below)]
    about = "The folders of the package by level; the numbers show the path of one private record."
    return end + 44, about, parts


def _panel(theme: Theme, top: float, title: str, found: Sequence[Score]) -> list[str]:
    """Return one panel: accuracy with its standard deviation by ε, one mark per method."""
    colors = MARKS[theme["name"]]
    lowest = min(score.mean - score.spread for score in found)
    highest = max(score.mean + score.spread for score in found)
    step = 10 if highest - lowest > 20 else 5
    low, high = lowest // step * step, -(-highest // step) * step
    bottom, scale = top + 150, 130 / (high - low)
    parts = [text(40, top + 8, title, theme["text"], more='font-weight="600"')]
    for value in range(int(low), int(high) + 1, step):
        y = round(bottom - (value - low) * scale, 1)
        parts.append(f'<line x1="40" y1="{y}" x2="450" y2="{y}" stroke="{theme["grid"]}"/>')
        parts.append(text(34, y + 4, str(value), theme["muted"], more='text-anchor="end"'))
    for score in found:
        index = METHODS.index(score.method)
        x = 40 + 410 * (EPSILONS.index(score.epsilon) + 0.5) / 3 + 20 * (index - 2)
        y, reach = bottom - (score.mean - low) * scale, score.spread * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{y - reach:.1f}" x2="{x:.1f}" y2="{y + reach:.1f}" '
            f'stroke="{colors[index]}" stroke-width="1.6"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colors[index]}"/>'
        )
    for i, epsilon in enumerate(EPSILONS):
        words = "not private" if epsilon == "inf" else f"ε = {epsilon}"
        parts.append(
            centered(round(40 + 410 * (i + 0.5) / 3, 1), bottom + 20, words, theme["text"])
        )
    return parts


def results(theme: Theme) -> tuple[int, str, list[str]]:
    """Return height, description and shapes of the picture of the results."""
    parts, colors = [], MARKS[theme["name"]]
    for i, (name, title) in enumerate(TITLES.items()):
        parts += _panel(theme, 16 + 200 * i, f"{title}: accuracy %", scores(name))
    for i, method in enumerate(METHODS):
        x, y = 40 + 140 * (i % 3), 420 + 20 * (i // 3)
        parts.append(f'<circle cx="{x + 5}" cy="{y - 4}" r="4.5" fill="{colors[i]}"/>')
        parts.append(text(x + 16, y, method, theme["text"]))
    about = "Test accuracy by ε and method, mean and standard deviation over three seeds."
    return 450, about, parts


def _planning_axes(theme: Theme, low: float, high: float) -> list[str]:
    """Return the lines and numbers of the axes; ``low`` and ``high``: the ends in decades."""
    parts = [text(10, 18, "noise over signal (log scale)", theme["text"], more='font-weight="600"')]
    for value in (1e-4, 2e-4, 4e-4):
        y = round(240 - 205 * (log10(value) - low) / (high - low), 1)
        parts.append(f'<line x1="64" y1="{y}" x2="370" y2="{y}" stroke="{theme["grid"]}"/>')
        parts.append(text(58, y + 4, f"{value:.0e}", theme["muted"], more='text-anchor="end"'))
    for steps in STEPS:
        parts.append(centered(_step_x(steps), 262, str(steps), theme["text"]))
    parts.append(centered(217, 284, "optimiser steps, at the same number of epochs", theme["text"]))
    return parts


def _step_x(steps: int) -> float:
    return round(72 + 290 * log2(steps / STEPS[0]) / log2(STEPS[-1] / STEPS[0]), 1)


def planning(theme: Theme) -> tuple[int, str, list[str]]:
    """Return height, description and shapes of the picture of the planner's numbers."""
    low, high = log10(9e-5), log10(6e-4)
    parts = _planning_axes(theme, low, high)
    for epochs, color in zip(EPOCHS, MARKS[theme["name"]], strict=False):
        found = [row for row in rows() if row.epochs == epochs]
        places = [
            (_step_x(row.steps), round(240 - 205 * (log10(row.own) - low) / (high - low), 1))
            for row in found
        ]
        path = " L".join(f"{x},{y}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>' for x, y in places]
        words = f"{epochs} epoch{'s' if epochs > 1 else ''}"
        parts.append(text(376, places[-1][1] + 4, words, color))
    about = (
        f"Noise over signal of the mean update of {CLIENTS} clients with {EXAMPLES:,} examples "
        f"each, at ε = {EPSILON:g}: it grows with the number of steps and falls with the epochs."
    )
    return 294, about, parts


PICTURES: Mapping[str, Callable[[Theme], tuple[int, str, list[str]]]] = {
    "guarantee": guarantee,
    "folders": folders,
    "results": results,
    "planning": planning,
}


def svg(name: str, theme: str) -> str:
    """Return one picture as SVG."""
    height, about, parts = PICTURES[name](THEMES[theme])
    font = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" font-family="{font}">'
    )
    return "\n".join([head, f"<title>{escape(about)}</title>", *parts, "</svg>"]) + "\n"


def main() -> None:
    """Write all pictures."""
    for name in PICTURES:
        for theme in THEMES:
            (IMAGES / f"{name}-{theme}.svg").write_text(svg(name, theme), "utf-8")


if __name__ == "__main__":
    main()
