"""Charts of a report, as text of matplotlib's SVG."""

import dataclasses
import io
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

# The palette of Okabe and Ito works with every kind of color vision. Seven colors and
# four kinds of dashes make 28 styles, which also differ in grayscale prints.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", "-.", ":")
ACCURACIES = (0, 20, 50, 70, 80, 90, 95, 98, 99, 99.5)
POINTS = 400
"""The largest number of points of a curve; a longer curve has means of neighbors."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bnjax",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    # A dollar sign in the name of a run does not start a formula.
    "text.parse_math": False,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: its points, its style and its label.

    Attributes:
        x: shape (points,).
        y: shape (points,); a value that is not finite is not drawn.
        style: the index of its color and dash.
        label: the label in the legend; empty for a curve that shares another label.
        low: the lower bound of a band around the curve, or None.
        high: the upper bound of the band, or None.
        faint: draw it thin, as one of several curves with one label.
    """

    x: np.ndarray
    y: np.ndarray
    style: int
    label: str = ""
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    faint: bool = False


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    width: float = 4.6,
    y_scale: Literal["linear", "accuracy"] = "linear",
) -> str:
    """Return a chart of some curves as an SVG document.

    Args:
        series: the curves. If several have a label, the chart has a legend.
        title: the title above the chart.
        x_label: the label of the x axis.
        y_label: the label of the y axis.
        width: the width in inches of 96 pixels; the text is still readable at two
            thirds of it.
        y_scale: "accuracy" is a scale for percentages, logarithmic in the errors: 97
            and 98 are as far apart as 94 and 96.

    Returns:
        The text of the SVG document.
    """
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The reader's fonts draw the text, not the fonts that measure it here.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        labels = sum(bool(each.label) for each in series)
        labels = labels if labels > 1 else 0
        height = 0.62 * width + 0.19 * labels
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for each in series:
            color = COLORS[each.style % len(COLORS)]
            dash = DASHES[each.style % len(DASHES)]
            x = _shorten(each.x)
            axes.plot(
                x,
                _shorten(each.y),
                dash,
                color=color,
                label=each.label or None,
                lw=0.9 if each.faint else 1.7,
                # Without a marker, a curve of one evaluation is invisible.
                marker="o" if len(each.x) == 1 else None,
            )
            if each.low is not None and each.high is not None:
                low, high = _shorten(each.low), _shorten(each.high)
                axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
        axes.set_title(title, loc="left")
        axes.set(xlabel=x_label, ylabel=y_label)
        if y_scale == "accuracy":
            axes.set_yscale("function", functions=(_by_errors, _from_errors))
            axes.yaxis.set_major_locator(FixedLocator(ACCURACIES))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if labels:
            figure.legend(loc="outside lower left", frameon=False, fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _by_errors(percent: np.ndarray) -> np.ndarray:
    # Values above 100 % are for the margins of the axis.
    return -np.log(np.maximum(100.2 - percent, 0.05))


def _from_errors(values: np.ndarray) -> np.ndarray:
    return 100.2 - np.exp(-values)


def _thousands(x: float, _: object = None) -> str:
    return f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}"


def _shorten(values: np.ndarray) -> np.ndarray:
    """Return means of neighbors, at most POINTS of them."""
    size = -(-len(values) // POINTS)
    if size <= 1:
        return values
    starts = np.arange(0, len(values), size)
    counts = np.diff(starts, append=len(values))
    return np.add.reduceat(np.asarray(values, np.float64), starts) / counts
