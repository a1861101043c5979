"""The picture of matrices of similarity, one panel per run."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lalora_app.reports.figure_style import report_style, svg

Panel = tuple[str, np.ndarray]
_SIDE = 3.2  # of a panel, in inches


def similarity_figure(layer: str, panels: Sequence[Panel]) -> str:
    """Return an SVG with a heat map per run of |cos| between singular vectors.

    Args:
        layer: the path of the layer.
        panels: title, and matrix (vectors of the base, vectors after training) in [0, 1].
    """
    with report_style():
        figure = Figure(figsize=(_SIDE * len(panels) + 0.9, _SIDE + 0.5), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, matrix) in zip(grid, panels, strict=True):
            image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1, interpolation="none")
            axes.grid(visible=False)
            axes.set_title(title.replace("$", r"\$"), fontsize=7)
            axes.set_xlabel("singular vector after training")
        grid[0].set_ylabel("singular vector of the base")
        figure.colorbar(image, ax=list(grid), label="|cos|", shrink=0.85)
        figure.suptitle(layer.replace("$", r"\$"), fontsize=8)
        return svg(
            figure, f"Similarity of the singular vectors of {layer} before and after training"
        )
