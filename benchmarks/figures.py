"""Shared code of the figures: colors, axes, and saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import ROOT

FIGURES = ROOT / "docs" / "figures"
WITH, WITHOUT = "with batch normalization", "without"
COLORS = {WITH: "C0", WITHOUT: "C3"}
# Behind text: hides the grid, and no curve.
CLEAR: dict[str, Any] = {
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    "zorder": 1.5,
}


def new_figure(columns: int = 1, height: float = 4.0, **options: Any) -> tuple:
    """Return a figure, 7 wide for one panel and 11 for more, and its axes.

    Args:
        columns: panels beside each other.
        height: of the figure.
        **options: of `Figure.subplots`.
    """
    width = 7 if columns == 1 else 11
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def seeds_of(record: dict[str, Any]) -> str:
    """Return the seeds of a result as a title tells them."""
    count = len(record["seeds"])
    return "one seed" if count == 1 else f"median and range of {count} seeds"


def plot_median(
    axes: Axes,
    x: Sequence[float],
    curves: npt.ArrayLike,
    color: str,
    label: str,
    **options: Any,
) -> np.ndarray:
    """Draw the median of several curves, and their range as a band.

    Args:
        axes: to draw on.
        x: shape (points,).
        curves: shape (curves, points).
        color: of line and band.
        label: for the legend.
        **options: of `Axes.plot`.

    Returns:
        The median, shape (points,).
    """
    values = np.asarray(curves)
    median = np.median(values, axis=0)
    axes.plot(x, median, color=color, label=label, **options)
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    return median


def mark(
    axes: Axes,
    point: tuple[float, float],
    text: str,
    color: str,
    offset: tuple[float, float] = (4, 0),
    **options: Any,
) -> None:
    """Write a number beside a point, on the side that `offset` (in points) says."""
    side, height = np.sign(offset)
    axes.annotate(
        text,
        point,
        xytext=offset,
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[side],
        va={-1: "top", 0: "center", 1: "bottom"}[height],
        color=color,
        **(CLEAR | options),
    )


def thousands(axes: Axes) -> None:
    """Label the steps in thousands: 0, 10k, 20k."""
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def save(figure: Figure, name: str) -> Path:
    """Save a figure to docs/figures, with a light grid and open axes."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path = FIGURES / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
