"""The figure of an audit: the ROC curves of the attacks, and the limit that ε and δ imply."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lalora_app.reports.figure_style import Style, add_legend, empty_figure, line_styles

_CHANCE_STYLE: Style = {"color": "#8a94a3", "linestyle": ":", "linewidth": 1.2}
_BOUND_STYLE: Style = {"color": "#1c2430", "linestyle": "-", "linewidth": 1.2}
Points = Sequence[tuple[float, float]]


def max_true_positive_rate(
    false_positives: NDArray[np.float64], epsilon: float, delta: float
) -> NDArray[np.float64]:
    """Return the largest true positive rate of a membership test under (ε, δ)-DP.

    min(e^ε·α + δ, 1 − e^(−ε)·(1 − δ − α)), clipped to [0, 1] (Kairouz et al., arXiv:1311.0776).

    Args:
        false_positives: false positive rates α, (points,).
        epsilon: ε.
        delta: δ.
    """
    low = np.exp(epsilon) * false_positives + delta
    high = 1 - np.exp(-epsilon) * (1 - delta - false_positives)
    limit: NDArray[np.float64] = np.minimum(low, high).clip(0, 1)
    return limit


def _set_logarithmic_axes(axes: Axes, lowest: float) -> None:
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1.0), ylim=(lowest, 1.3))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")


def roc_figure(audit: dict[str, Any]) -> Figure:
    """Return the ROC curve of every part of an audit, on logarithmic axes.

    Args:
        audit: content of audit.json; a part without a ROC curve has no line.
    """
    curves: dict[str, Points] = {n: p["roc"] for n, p in audit["parts"].items() if p["roc"]}
    lowest = min((a for points in curves.values() for a, _ in points if a > 0), default=1e-3)
    figure, axes = empty_figure()
    styles = line_styles(curves)
    for name, points in curves.items():
        axes.plot(*np.array(points).T, drawstyle="steps-post", **styles[name] | {"marker": ""})
    false_positives = np.geomspace(lowest, 1.0, 200)
    bounds = f"allowed at ε = {audit['epsilon_upper']:.3g}"
    axes.plot(
        false_positives,
        max_true_positive_rate(false_positives, audit["epsilon_upper"], audit["delta"]),
        **_BOUND_STYLE,
    )
    axes.plot(false_positives, false_positives, **_CHANCE_STYLE)
    _set_logarithmic_axes(axes, lowest)
    marks = {name: style | {"marker": ""} for name, style in styles.items()}
    add_legend(figure, marks | {bounds: _BOUND_STYLE, "guessing": _CHANCE_STYLE})
    return figure
