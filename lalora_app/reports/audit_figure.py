"""The figure of an audit: what its attacks reach, and what the ledger's ε allows them at most."""

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
    alarms: NDArray[np.float64], epsilon: float, delta: float
) -> NDArray[np.float64]:
    """Return the largest hit rate that (ε, δ)-DP allows a test at each false alarm rate."""
    low = np.exp(epsilon) * alarms + delta
    high = 1 - np.exp(-epsilon) * (1 - delta - alarms)
    most: NDArray[np.float64] = np.minimum(low, high).clip(0, 1)
    return most


def _set_logarithmic_axes(axes: Axes, lowest: float) -> None:
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1.0), ylim=(lowest, 1.3))
    axes.set(xlabel="false alarm rate", ylabel="hit rate")


def roc_figure(audit: dict[str, Any]) -> Figure:
    """Return the ROC of each part of an audit on logarithmic axes.

    Args:
        audit: of audit.json; a part without a ROC has no line.
    """
    rocs: dict[str, Points] = {n: p["roc"] for n, p in audit["parts"].items() if p["roc"]}
    lowest = min((a for points in rocs.values() for a, _ in points if a > 0), default=1e-3)
    drawn, axes = empty_figure()
    looks = line_styles(rocs)
    for name, points in rocs.items():
        axes.plot(*np.array(points).T, drawstyle="steps-post", **looks[name] | {"marker": ""})
    alarms = np.geomspace(lowest, 1.0, 200)
    bounds = f"allowed at ε = {audit['epsilon_upper']:.3g}"
    axes.plot(
        alarms,
        max_true_positive_rate(alarms, audit["epsilon_upper"], audit["delta"]),
        **_BOUND_STYLE,
    )
    axes.plot(alarms, alarms, **_CHANCE_STYLE)
    _set_logarithmic_axes(axes, lowest)
    marks = {name: look | {"marker": ""} for name, look in looks.items()}
    add_legend(drawn, marks | {bounds: _BOUND_STYLE, "guessing": _CHANCE_STYLE})
    return drawn
