"""What the figures share: colours, axes, and how they are saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.report import ROOT

FIGURES = ROOT / "docs" / "figures"
WITH, WITHOUT = "with batch normalization", "without"
COLORS = {WITH: "C0", WITHOUT: "C3"}


def new_figure(columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure, 7 wide for one panel and 11 for more, and its axes.

    Args:
        columns: panels beside each other.
        rows: panels below each other.
        **options: of `Figure.subplots`.
    """
    width = 7 if columns == 1 else 11
    figure = Figure(figsize=(width, 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def plot_median(
    axes: Axes,
    x: Sequence[float],
    curves: Sequence[Sequence[float]],
    color: str,
    label: str,
) -> np.ndarray:
    """Draw the median of several curves, and their range as a band.

    Args:
        axes: to draw on.
        x: shape (points,).
        curves: shape (curves, points).
        color: of line and band.
        label: for the legend.

    Returns:
        The median, shape (points,).
    """
    values = np.asarray(curves)
    median = np.median(values, axis=0)
    axes.plot(x, median, color=color, label=label)
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    return median


def mark_end(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Write a number beside the end of a curve."""
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=color,
    )


def thousands(axes: Axes) -> None:
    """Label the steps in thousands: 0, 10k, 20k."""
    label = FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    axes.xaxis.set_major_formatter(label)


def save(figure: Figure, name: str) -> Path:
    """Save a figure to docs/figures, with a light grid and open axes."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path = FIGURES / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
