"""Draw accuracy by number of clients, with own and with shared noise, from docs/results.md.

python scripts/shared_noise_picture.py
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from results_table import rows

from lalora_app.reports.figure_style import Curve, curve_figure, line_styles, report_style, svg

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "images" / "shared-noise-clients.svg"
SECTIONS: Mapping[int, str] = {  # of the page, by number of clients
    4: "shared-noise-swin",
    20: "shared-noise-swin-20-clients",
    100: "shared-noise-swin-100-clients",
}
LINES = {  # of the picture, and of the tables
    "head, own noise": "head-only",
    "head, shared noise": "head-only with shared noise",
    "rolora, own noise": "rolora",
    "rolora, shared noise": "rolora with shared noise",
}
EPSILON = "1"
STYLES = {"head-only": ":", "rolora": "--"}  # of the lines at one client
Scores = dict[str, tuple[float, float]]  # accuracy in percent, mean and deviation, by line


def scores(section: str) -> Scores:
    """Return the lines of a table at the picture's ε."""
    found = {}
    for cells in rows(section):
        shown = re.fullmatch(r"([\d.]+)(?: ± ([\d.]+))?", cells[3]) if len(cells) > 6 else None
        if shown and cells[1] == EPSILON:
            found[cells[0]] = (float(shown[1]), float(shown[2] or 0))
    return found


def curve(points: Mapping[int, tuple[float, float]]) -> Curve:
    """Return the mean by number of clients, with a band of one deviation on each side."""
    clients, values = np.array(list(points), float), np.array(list(points.values()))
    mean, spread = values.T
    return Curve(clients, mean - spread, mean, mean + spread, np.zeros(len(mean), bool))


def draw_ceilings(axes: Axes, table: Scores) -> None:
    """Draw a line at the accuracy of one client with all data, with its name above or below it."""
    found = {m: table[f"{m} at one client"][0] for m in STYLES if f"{m} at one client" in table}
    for method, mean in found.items():
        axes.axhline(mean, color="#4a5361", linestyle=STYLES[method], linewidth=1.2)
        side = 1 if mean == max(found.values()) else -1
        place = {"va": "bottom" if side > 0 else "top", "textcoords": "offset points"}
        name = f"one client with all data, {method}"
        axes.annotate(name, (6, mean), xytext=(0, 6 * side), size=8, **place)


def picture() -> str:
    """Return the picture as SVG."""
    tables = {clients: scores(section) for clients, section in SECTIONS.items()}
    curves = {}
    for label, line in LINES.items():
        points = {clients: found[line] for clients, found in tables.items() if line in found}
        if points:
            curves[label] = curve(points)
    with report_style():
        figure = curve_figure(curves, line_styles(LINES))
        axes = figure.axes[0]
        draw_ceilings(axes, tables[4])
        axes.set_xscale("log")
        axes.set_xticks(list(SECTIONS), [str(clients) for clients in SECTIONS])
        axes.minorticks_off()
        axes.set(xlabel="clients", ylabel="accuracy %", ylim=(0, 60))
        return svg(figure, "Accuracy by number of clients with own and shared noise, at epsilon 1")


def main() -> None:
    """Write the picture."""
    FILE.write_text(picture() + "\n", "utf-8")


if __name__ == "__main__":
    main()
