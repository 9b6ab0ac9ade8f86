"""Charts of a report: matplotlib's SVG, as text."""

import dataclasses
import io
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

# Okabe and Ito's, told apart with every kind of colour vision. With four kinds of
# dashes, seven colours make 28 styles, which differ on grey paper too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", "-.", ":")
ACCURACIES = (0, 20, 50, 70, 80, 90, 95, 98, 99, 99.5)
POINTS = 400
"""Of one curve; those of a longer one are means of neighbours."""
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
    # A dollar in the name of a run is no formula.
    "text.parse_math": False,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: its points, and what it is called.

    Attributes:
        x, y: shape (points,); where `y` is not finite there is no point.
        style: which colour and dash it has.
        label: in the legend; empty for a curve that shares another's.
        low, high: bounds of a band around it, None for none.
        faint: thin, as one of several of the same label.
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
        series: the curves. If several are labelled there is a legend.
        title: above it.
        x_label: below it.
        y_label: beside it.
        width: in inches of 96 pixels; at two thirds of it the text is still readable.
        y_scale: "accuracy" is for percentages, and logarithmic in the errors, so that
            97 and 98 are as far apart as 94 and 96.
    """
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The reader's fonts draw the text, not those that measure it here.
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
                # A curve of one evaluation would not be seen.
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
    # What is above is for the margins of the axis.
    return -np.log(np.maximum(100.2 - percent, 0.05))


def _from_errors(values: np.ndarray) -> np.ndarray:
    return 100.2 - np.exp(-values)


def _thousands(x: float, _: object = None) -> str:
    return f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}"


def _shorten(values: np.ndarray) -> np.ndarray:
    """Return means of neighbours, so many that at most POINTS are left."""
    size = -(-len(values) // POINTS)
    if size <= 1:
        return values
    starts = np.arange(0, len(values), size)
    counts = np.diff(starts, append=len(values))
    return np.add.reduceat(np.asarray(values, np.float64), starts) / counts
