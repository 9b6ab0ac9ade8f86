"""Section 3.3 of the paper: are the singular values of layer Jacobians close to 1?

    python -m experiments.jacobian

Trains the network of the `mnist` preset with batch normalization and without, from
weights of a standard deviation of 0.01 and of 0.1, and takes the exact Jacobian of the
map from one hidden layer's output to the next's at 50 test examples. As the paper's
argument is about normalized vectors, both outputs are measured in units of their own
standard deviation over 1,000 test examples, unit by unit, in both networks; the raw
values are in the result too. BN normalizes by the statistics of those examples. Writes
experiments/results/jacobian.json and docs/figures/jacobian.png. About two minutes on
two CPU cores; started again, it trains only what is not in runs/experiments.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.data.sources import open_data
from bnjax.diagnostics import layer_block, layer_input, singular_values
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from bnjax.training.program import build
from experiments.figures import COLORS, WITH, WITHOUT, new_figure, save
from experiments.runs import once, rounded, visit

RESULT = ROOT / "experiments" / "results" / "jacobian.json"
NETWORKS = {WITH: True, WITHOUT: False}
STDS = (0.01, 0.1)
STEPS = [0, 250, 500, 1000, 2000, 4000, 8000, 16_000]
EXAMPLES, POINTS = 1000, 50
PERCENTILES = (5, 50, 95)
BLOCKS = {
    "hidden layer 1 to 2": ("dense_1", "dense_2"),
    "hidden layer 2 to 3": ("dense_2", "logits"),
}
SHOWN = "hidden layer 2 to 3"


def reproduce(data_dir: Path | None = None) -> None:
    """Train, measure, write and draw.

    Args:
        data_dir: Where TensorFlow Datasets are prepared.
    """
    base = dataclasses.replace(
        PRESETS["mnist"].config, steps=STEPS[-1], data_dir=data_dir
    )
    result: dict[str, Any] = {}
    for std in STDS:
        model = dataclasses.replace(base.model, weight_std=std)
        result[f"weight_std {std}"] = {
            name: once(
                "jacobian",
                dataclasses.replace(base, model=model, batch_norm=batch_norm),
                spectra,
            )
            for name, batch_norm in NETWORKS.items()
        }
    command = " ".join(["python -m experiments.jacobian", *sys.argv[1:]])
    write_result(RESULT, command, [base.seed], {"steps": STEPS} | result)
    print(f"{RESULT}\n{draw(result)}")


def spectra(config: Config) -> dict[str, Any]:
    """Train one network; return the singular values of each block on the way."""
    source = open_data(config.data, config.data_dir)
    program = build(config, source)
    test = source.load("test", lambda *_: None)
    images = program.gather(test, np.arange(EXAMPLES))["image"]
    measure = make_measure(program.model, images)
    found: dict[str, list[Any]] = {}
    for run in visit(config, STEPS):
        values = measure(run.state.params, run.state.batch_stats)
        for name, singular in values.items():
            found.setdefault(name, []).append(np.asarray(singular))
    return {name: summary(values) for name, values in found.items()}


def make_measure(model: Any, images: jax.Array) -> Callable[..., dict[str, jax.Array]]:
    """Return the jitted function from variables to the singular values of blocks."""
    # Momentum 0: the running statistics become those of the images.
    normalization = dataclasses.replace(
        model.normalization, momentum=0.0, unbiased=False
    )
    learning = model.clone(normalization=normalization)

    @jax.jit
    def measure(params: Any, batch_stats: Any) -> dict[str, jax.Array]:
        variables = {"params": params, "batch_stats": batch_stats}
        if batch_stats:
            _, updated = learning.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            variables = {"params": params, **updated}
        values = {}
        for name, (start, end) in BLOCKS.items():
            z, after = (
                layer_input(model, variables, images, at) for at in (start, end)
            )
            block = layer_block(model, variables, images, start, end)
            unit, unit_after = z.std(0), after.std(0)

            def in_units(
                v: jax.Array, block=block, unit=unit, unit_after=unit_after
            ) -> jax.Array:
                return block(v * unit) / unit_after

            values[name] = singular_values(in_units, z[:POINTS] / unit)
            values[f"{name}, raw"] = singular_values(block, z[:POINTS])
        return values

    return measure


def summary(values: list[np.ndarray]) -> dict[str, Any]:
    """Return percentiles and how many are near 1, for each step."""
    flat = [value.ravel().astype(np.float64) for value in values]
    near = [np.mean((value >= 0.5) & (value <= 2)) for value in flat]
    condition = [np.median(value[:, 0] / value[:, -1]) for value in values]
    return {
        "percentiles": {
            f"{p}": [rounded(float(np.percentile(value, p))) for value in flat]
            for p in PERCENTILES
        },
        "largest_median": [rounded(float(np.median(v[:, 0]))) for v in values],
        "share_from_half_to_2": [rounded(float(share)) for share in near],
        "condition_number_median": [rounded(float(number)) for number in condition],
    }


def draw(result: dict[str, Any]) -> Path:
    """Draw the percentiles against the steps, one panel a standard deviation."""
    figure, panels = new_figure(2, sharey=True)
    places = range(len(STEPS))
    for axes, std in zip(panels, STDS, strict=True):
        for name, color in COLORS.items():
            found = result[f"weight_std {std}"][name][SHOWN]
            low, median, high = (found["percentiles"][f"{p}"] for p in PERCENTILES)
            axes.plot(places, median, "o-", ms=4, color=color, label=f"{name}: median")
            largest = found["largest_median"]
            axes.plot(places, largest, ":", color=color, label=f"{name}: largest")
            axes.fill_between(places, low, high, color=color, alpha=0.2, lw=0)
        axes.axhline(1, color="k", lw=1, ls="--")
        axes.set_xticks(
            places, [f"{step / 1000:g}k" if step else "0" for step in STEPS]
        )
        axes.set(
            title=f"weights started at a deviation of {std}",
            xlabel="training steps",
            xlim=(0, len(STEPS) - 1),
            yscale="log",
        )
    panels[0].set_ylabel("singular values of the layer Jacobian")
    handles = panels[0].get_legend_handles_labels()
    title = "bands: 5th to 95th percentile"
    figure.legend(*handles, loc="outside lower center", ncols=4, title=title)
    return save(figure, "jacobian")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
