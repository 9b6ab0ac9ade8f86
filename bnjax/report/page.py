"""The page of a report: one HTML file without scripts that loads nothing."""

import base64
import dataclasses
import datetime as dt
import fnmatch
import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bnjax
from bnjax.data.config import SettingError
from bnjax.doctor import Finding
from bnjax.interop.torch import natural
from bnjax.report.charts import Series, line_chart
from bnjax.report.html import duration, percent, table, tag, text
from bnjax.report.runs import RunReport
from bnjax.training.metrics import PERCENTILES

Findings = tuple[Finding, ...] | str
SHOWN_LAYERS = 3
"""The number of layers in a chart by default, which are first, middle and last."""
TITLES = {
    "layers": {
        "mean": "Running mean",
        "var": "Running variance",
        "scale": "Scale",
        "bias": "Bias",
    },
    "inputs": {"all": "All features", "first": "The first feature"},
}
CLOSE = 80
"""Accuracies above this percentage have a scale that is wider toward 100."""
LONGEST = 40
"""The largest number of letters of a name in a legend."""
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def make_report(
    runs: Sequence[RunReport],
    findings: Sequence[Findings],
    *,
    accuracies: Sequence[float] = (),
    layers: Sequence[str] = (),
) -> str:
    """Return the page as HTML.

    Args:
        runs: one or more runs, from `read_runs`.
        findings: for each run, the doctor's findings, or a sentence that says why there
            are none.
        accuracies: report the steps that each run took to these. Empty: for each group,
            to the best accuracy that every run of the group reached.
        layers: patterns of the layers to draw. Empty: SHOWN_LAYERS of them.

    Returns:
        The text of the file.
    """
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    sections = [
        ("runs", "Runs", _overview(runs)),
        ("differences", "Differences between their settings", _differences(runs)),
        ("curves", "Accuracy and loss", _curves(runs)),
        ("steps", "Steps to an accuracy", _steps_to(runs, accuracies)),
        ("statistics", "Batch normalization through training", _layers(runs, layers)),
        ("findings", "Findings of the doctor", _findings(runs, findings)),
    ]
    now = dt.datetime.now(dt.UTC).isoformat(" ", "minutes").removesuffix("+00:00")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width"),
            tag("meta", {"http-equiv": "Content-Security-Policy"}, content=policy),
            tag("title", f"{count}: {', '.join(run.name for run in runs[:4])}"),
            tag("style", STYLE),
        ),
        tag(
            "body",
            tag("a", "Skip to the runs", {"class": "skip", "href": "#runs"}),
            tag(
                "header",
                tag("h1", f"Report of {count}"),
                tag("p", f"Made {now} UTC by bnjax {bnjax.__version__}."),
                tag(
                    "nav",
                    *(tag("a", title, href=f"#{key}") for key, title, _ in sections),
                    {"aria-label": "Sections"},
                ),
            ),
            tag(
                "main",
                *(
                    tag("section", tag("h2", title), *content, id=key)
                    for key, title, content in sections
                ),
            ),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{ET.tostring(page, encoding='unicode', method='html')}\n"


def _overview(runs: Sequence[RunReport]) -> Iterator[ET.Element]:
    header = ("run", "test accuracy", "best", "at step", "test loss", "steps", "time")
    rows = []
    for run in runs:
        accuracy, steps = run.test["accuracy"], run.test["step"]
        wanted = run.settings["--steps"]
        at = int(run.train["step"][-1]) if len(run.train["step"]) else 0
        seconds = run.train["seconds"][-1:].sum()
        cells = ["-"] * 4
        if len(steps) and np.isfinite(accuracy).any():
            best = int(np.nanargmax(accuracy))
            cells = [percent(accuracy[-1]), percent(accuracy[best])]
            cells += [f"{steps[best]:,.0f}", f"{run.test['loss'][-1]:.4f}"]
        done = f"{at:,}" if run.ended else f"{at:,} of {wanted}, not finished"
        rows.append((run.name, *cells, done, duration(seconds)))
    yield table("The runs and how they ended", header, rows)
    yield tag(
        "p",
        "Accuracy and loss are measured on the test set; the best accuracy is that of "
        "any evaluation. The time counts the training steps, without compilation and "
        "evaluation.",
    )


def _differences(runs: Sequence[RunReport]) -> Iterator[ET.Element]:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = {name: [run.settings.get(name, "-") for run in runs] for name in names}
    differ = {name: row for name, row in values.items() if len(set(row)) > 1}
    same = {name: row[0] for name, row in values.items() if name not in differ}
    if differ:
        rows = [(name, *row) for name, row in differ.items()]
        header = ("setting", *(run.name for run in runs))
        yield table("Settings that differ", header, rows)
    elif len(runs) > 1:
        yield tag("p", "In nothing.")
    shared = table("Settings that are the same", ("setting", "value"), same.items())
    summary = f"{len(same)} {'shared settings' if len(runs) > 1 else 'settings'}"
    yield tag("details", tag("summary", summary), shared)


def _curves(runs: Sequence[RunReport]) -> Iterator[ET.Element]:
    charts = []
    for (what, unit), (along, x_label) in itertools.product(
        (("accuracy", "%"), ("loss", "")),
        (("step", "training steps"), ("seconds", "seconds of training")),
    ):
        factor = 100 if unit else 1
        series = [
            _series(run, runs, run.test[along], factor * run.test[what])
            for run in runs
            if len(run.test["step"])
        ]
        title = f"Test {what} against {'steps' if along == 'step' else 'time'}"
        high = max((each.y.max(initial=0) for each in series), default=0)
        scale = "accuracy" if unit and high > CLOSE else "linear"
        options = {"y_scale": scale, "y_label": f"test {what}{unit and f' ({unit})'}"}
        charts.append((series, title, x_label, options))
    series = [
        _series(run, runs, run.train["step"], run.train["loss"])
        for run in runs
        if len(run.train["step"])
    ]
    options = {"y_label": "loss of the batches"}
    charts.append((series, "Training loss against steps", "training steps", options))
    figures = [_figure(*chart, **options) for *chart, options in charts if chart[0]]
    if not figures:
        yield tag("p", "There are no measurements yet.")
        return
    yield _figures(figures)
    yield tag("p", _about_groups(runs, "The charts show all of them."))


def _steps_to(
    runs: Sequence[RunReport], accuracies: Sequence[float]
) -> Iterator[ET.Element]:
    bests: dict[int, list[float]] = {}
    for run in runs:
        accuracy = run.test["accuracy"][np.isfinite(run.test["accuracy"])]
        bests.setdefault(run.group, []).append(float(accuracy.max(initial=0)))
    about = "Each cell is the first evaluation at or above an accuracy."
    if not accuracies:
        accuracies = sorted({min(each) for each in bests.values()} - {0.0})
        about += (
            " The accuracy is the best that every run with the same settings "
            "reached; --accuracy selects others."
        )
    if not accuracies:
        yield tag("p", "There are no evaluations yet.")
        return
    header = ("run", *(percent(accuracy) for accuracy in accuracies))
    rows = []
    for run in runs:
        cells = []
        for accuracy in accuracies:
            reached = np.flatnonzero(run.test["accuracy"] >= accuracy)
            cells.append("not reached")
            if reached.size:
                step, seconds = (run.test[n][reached[0]] for n in ("step", "seconds"))
                cells[-1] = f"{step:,.0f} ({duration(float(seconds))})"
        rows.append((run.name, *cells))
    yield table("Steps, and time of training", header, rows)
    yield tag("p", about)


def _layers(runs: Sequence[RunReport], patterns: Sequence[str]) -> Iterator[ET.Element]:
    first = {run.group: run for run in reversed(runs) if run.layers}
    drawn = [run for run in runs if first.get(run.group) is run]
    without = [run.name for run in runs if not run.layers]
    if without:
        yield tag(
            "p", f"These runs have no records or no such layer: {_list(without)}."
        )
    names_of = _layer_names(drawn)
    for kind, names in names_of.items():
        chosen = _choose(names, patterns)
        if not names:
            if kind == "inputs" and drawn:
                yield tag(
                    "p",
                    "The distributions of the nonlinearities' inputs were not "
                    "recorded: train with --record-inputs.",
                )
            continue
        for layer in chosen:
            charts = []
            for array, title in TITLES[kind].items():
                found = [_distribution(run, runs, kind, layer, array) for run in drawn]
                if series := [each for each in found if each is not None]:
                    charts.append(
                        _figure(series, title, "training steps", y_label="", width=3.8)
                    )
            of = "inputs of its nonlinearity" if kind == "inputs" else "its numbers"
            yield tag("h3", f"{layer}: {of}")
            yield _figures(charts, "small")
        low, middle, high = PERCENTILES
        units = "the features" if kind == "layers" else "the values, of test images"
        about = f"Line: percentile {middle} of {units}; band: {low} to {high}. "
        if left := [name for name in names if name not in chosen]:
            about += (
                f"The charts show {len(chosen)} of {len(names)} layers; --layers "
                f"selects others: {_list(left)}. "
            )
        about += f"Runs shown: {_list([run.name for run in drawn])}. "
        yield tag("p", about + _about_groups(runs, "The charts show the first."))


def check_layers(runs: Sequence[RunReport], patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer."""
    names = list(dict.fromkeys(itertools.chain(*_layer_names(runs).values())))
    for pattern in patterns:
        if not _choose(names, [pattern]):
            raise SettingError(
                f"--layers {pattern}: these runs have no such layer. Expected "
                f"some of: {', '.join(names) or 'none was recorded'}."
            )


def _layer_names(runs: Sequence[RunReport]) -> dict[str, list[str]]:
    return {
        kind: sorted(
            {name for run in runs for line in run.layers for name in line[kind]},
            key=natural,
        )
        for kind in TITLES
    }


def _findings(
    runs: Sequence[RunReport], findings: Sequence[Findings]
) -> Iterator[ET.Element]:
    rows = []
    for run, found in zip(runs, findings, strict=True):
        if isinstance(found, str):
            yield tag("p", f"{run.name} was not examined: {found}")
            continue
        if not found:
            yield tag("p", f"{run.name}: no finding.")
        rows += [
            (
                each.severity,
                run.name,
                each.path,
                f"{each.message} {each.fix}",
                ", ".join(f"{n} {text(v)}" for n, v in each.evidence.items()),
            )
            for each in found
        ]
    if rows:
        header = ("severity", "run", "where", "what", "evidence")
        yield table("Findings", header, rows, prose=(3, 4))


def _distribution(
    run: RunReport, runs: Sequence[RunReport], kind: str, layer: str, array: str
) -> Series | None:
    """Return the percentiles of an array during training, if the run has them."""
    lines = [
        (line["step"], *found)
        for line in run.layers
        if (found := line[kind].get(layer, {}).get(array))
    ]
    if not lines:
        return None
    step, low, middle, high = np.asarray(lines, np.float64).T
    return dataclasses.replace(
        _series(run, runs, step, middle), low=low, high=high, faint=False
    )


def _series(
    run: RunReport, runs: Sequence[RunReport], x: np.ndarray, y: np.ndarray
) -> Series:
    """Return a curve of a run in the style of its group, with one label per group."""
    group = [each for each in runs if each.group == run.group]
    label = run.name if len(run.name) <= LONGEST else f"…{run.name[-LONGEST:]}"
    if more := len(group) - 1:
        label += f" and {more} more seed{'' if more == 1 else 's'}"
    label = label if group[0] is run else ""
    return Series(x, y, run.group, label, faint=bool(more))


def _figure(
    series: Sequence[Series], title: str, x_label: str, *, y_label: str, **options: Any
) -> ET.Element:
    """Return a chart and a table of its numbers for readers who cannot see it."""
    svg = line_chart(series, title, x_label, y_label, **options)
    data = base64.b64encode(svg.encode()).decode()
    rows, label = [], ""
    for each in series:
        label = each.label or label
        y = each.y[np.isfinite(each.y)]
        ends = (y[0], y.min(), y.max(), y[-1]) if y.size else [math.nan] * 4
        rows.append((label, *(f"{value:.4g}" for value in ends)))
    header = ("run", "first", "lowest", "highest", "last")
    numbers = table(y_label or title, header, rows)
    alt = f"Line chart: {title}. Its first, lowest, highest and last values follow."
    source = f"data:image/svg+xml;base64,{data}"
    return tag(
        "figure",
        tag("img", src=source, alt=alt, loading="lazy"),
        tag("details", tag("summary", "Numbers"), numbers),
    )


def _about_groups(runs: Sequence[RunReport], drawn: str) -> str:
    if len({run.group for run in runs}) == len(runs):
        return ""
    return f"Runs that differ only in their seed have one color. {drawn}"


def _list(names: Sequence[str]) -> str:
    more = len(names) - 8
    return ", ".join(names[:8]) + (f" and {more} more" if more > 0 else "")


def _figures(figures: Sequence[ET.Element], size: str = "") -> ET.Element:
    return tag("div", *figures, {"class": f"figures {size}".strip()})


def _choose(names: list[str], patterns: Sequence[str]) -> list[str]:
    if patterns:
        return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    places = np.linspace(0, len(names) - 1, min(SHOWN_LAYERS, len(names)))
    return [names[round(place)] for place in places]
