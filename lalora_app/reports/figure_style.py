"""Style of the figures, and their conversion to inline SVG with reproducible bytes."""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

Style = dict[str, Any]

# The palette of Okabe and Ito without yellow, whose contrast with white is too low.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS, _LINES = "osD^vP*<", ("-", "--", "-.", ":")
_RC_PARAMS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lalora",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#4a5361",
    "ytick.color": "#4a5361",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}
_FAILED_STYLE: Style = {"marker": "x", "linestyle": "none", "color": "#b3261e", "zorder": 5}
_FAILED_STYLE |= {"markersize": 8, "markeredgewidth": 2}
_WIDTH, _HEIGHT = 4.1, 2.8  # size of a panel in inches, without the legend
_MAX_NAME_LENGTH = 44  # in characters


@dataclass(frozen=True)
class Curve:
    """One curve over the runs of several seeds; every array has the shape (points,).

    Attributes:
        x: horizontal position, mean over seeds.
        low: lowest value of any seed.
        mean: mean value over seeds.
        high: highest value of any seed.
        failed: whether the round failed for at least one seed.
    """

    x: NDArray[np.float64]
    low: NDArray[np.float64]
    mean: NDArray[np.float64]
    high: NDArray[np.float64]
    failed: NDArray[np.bool_]


@contextmanager
def report_style() -> Iterator[None]:
    """Use the report's style inside a block; the user's matplotlib settings are ignored."""
    with warnings.catch_warnings(), matplotlib.style.context(_RC_PARAMS, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph")  # the browser draws the text with its own fonts
        yield


def _matplotlib_text(text: str, longest: int = _MAX_NAME_LENGTH) -> str:
    """Return a name with $ escaped for matplotlib, and shortened to ``longest`` characters."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return short.replace("$", r"\$")


def svg(figure: Figure, description: str) -> str:
    """Return a figure as an SVG element.

    Args:
        figure: the figure.
        description: text for screen readers.

    All ids start with a hash of description and content, so that ids of different figures of one
    page differ.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    prefix = "f" + hashlib.sha256((description + text).encode()).hexdigest()[:10] + "-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", f'<svg role="img" aria-label={quoteattr(description)}', 1)


def line_styles(labels: Iterable[str]) -> dict[str, Style]:
    """Return colour, marker and line type of every distinct label, in order of appearance."""
    styles = zip(dict.fromkeys(labels), cycle(_COLOURS), cycle(_MARKERS), cycle(_LINES))
    return {label: {"color": c, "marker": m, "linestyle": line} for label, c, m, line in styles}


def _draw_curve(axes: Axes, line: Curve, style: Style) -> None:
    every = max(1, len(line.x) // 10)
    axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)
    if len(line.x) == 1:  # a filled band of one point would be invisible
        axes.vlines(line.x, line.low, line.high, color=style["color"], alpha=0.5)
    axes.plot(line.x, line.mean, markevery=every, **style)
    axes.plot(line.x[line.failed], line.mean[line.failed], **_FAILED_STYLE)


def add_legend(figure: Figure, marks: Mapping[str, Style]) -> None:
    """Add a legend below the axes and increase the height of the figure accordingly.

    Args:
        figure: the figure, changed in place.
        marks: style of the legend's line per name.
    """
    names = [_matplotlib_text(name) for name in marks]
    columns = min(3, len(names), max(1, 54 // (max(map(len, names)) + 6)))
    figure.set_figheight(_HEIGHT + 0.21 * math.ceil(len(names) / columns) + 0.1)
    handles = [Line2D([], [], **style) for style in marks.values()]
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def empty_figure() -> tuple[Figure, Axes]:
    """Return a figure with the size of a panel, and its empty axes."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    return figure, figure.add_subplot()


def curve_figure(
    curves: Mapping[str, Curve], styles: Mapping[str, Style], *, log: bool = False
) -> Figure:
    """Return a figure with a line and a band per label, and a legend below the axes.

    Args:
        curves: curve per label.
        styles: style per label, for all panels of the chart; a single label gets no legend.
        log: whether the vertical axis is logarithmic.
    """
    figure, axes = empty_figure()
    for label, line in curves.items():
        _draw_curve(axes, line, styles[label])
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    marks = {label: styles[label] for label in curves} if len(styles) > 1 else {}
    if any(line.failed.any() for line in curves.values()):
        marks |= {"failed round": _FAILED_STYLE}
    if marks:
        add_legend(figure, marks)
    return figure


def share_y_limits(panels: Sequence[Axes]) -> None:
    """Set the vertical limits of all axes to their common range."""
    lows, highs = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(lows), max(highs))


def _annotate(axes: Axes, counts: NDArray[np.int64]) -> None:
    for (client, label), count in np.ndenumerate(counts):
        colour = "white" if count > 0.6 * counts.max() else "#1c2430"
        axes.text(label, client, f"{count:,}", ha="center", va="center", color=colour, size=8)


def heat_map(labels: Sequence[str], counts: NDArray[np.int64], title: str) -> Figure:
    """Return the figure of a partition: examples per client and label, and per client.

    Args:
        labels: names of the labels, (labels,).
        counts: numbers of examples, (clients, labels); written into the figure for at most 20
            clients and 8 labels.
        title: title of the figure.
    """
    clients, few = len(counts), len(counts) <= 20 and len(labels) <= 8
    figure = Figure(figsize=(_WIDTH, min(7.0, 1.3 + 0.3 * clients)), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    image = heat.imshow(counts, cmap="Blues", vmin=0, aspect="auto", interpolation="none")
    if few:
        _annotate(heat, counts)
    else:
        figure.colorbar(image, ax=heat, label="examples")
    if len(labels) <= 30:
        names, turn = [_matplotlib_text(name, 16) for name in labels], 90 if len(labels) > 4 else 0
        heat.set_xticks(range(len(labels)), names, rotation=turn)
    bars.barh(range(clients), counts.sum(axis=1), color=_COLOURS[0], height=0.7)
    heat.yaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    bars.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    heat.grid(visible=False)
    bars.grid(visible=False, axis="y")
    bars.tick_params(left=False)
    heat.set(title=_matplotlib_text(title), xlabel="label", ylabel="client")
    bars.set(xlabel="examples")
    return figure
