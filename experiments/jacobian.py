"""Section 3.3 of the paper: are the singular values of layer Jacobians close to 1?

    python -m experiments.jacobian

Trains the network of the `mnist` preset with and without batch normalization, from
weights with a standard deviation of 0.01 and of 0.1. Then computes the exact Jacobian
of the map from one hidden layer's output to the next layer's output at 50 test
examples. The paper's argument is about normalized vectors. Both outputs are therefore
measured in units of each unit's standard deviation over 1,000 test examples, in both
networks; the result has the raw values too. BN normalizes by the statistics of these
examples. Writes experiments/results/jacobian.json and docs/figures/jacobian.png. Takes
about two minutes on two CPU cores; a second start trains only runs that are not in
runs/experiments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.figures import COLORS, WITH, WITHOUT, Figure, new_figure
from benchmarks.report import run_command
from bnjax.diagnostics import layer_block, layer_input, singular_values
from bnjax.training.config import Config
from experiments.runs import Task, changed, finish, once, preset, rounded, visit

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


def reproduce() -> None:
    """Train, measure, write and draw."""
    base = preset("mnist", {"steps": STEPS[-1]})
    result: dict[str, Any] = {"steps": STEPS}
    for std in STDS:
        result[f"weight_std {std}"] = {
            name: once(
                "jacobian",
                changed(base, {"model.weight_std": std, "batch_norm": batch_norm}),
                spectra,
            )
            for name, batch_norm in NETWORKS.items()
        }
    finish("jacobian", result, [base.seed], draw)


def spectra(config: Config) -> dict[str, Any]:
    """Train one network; return the singular values of each block on the way."""
    task = Task(config)
    images = task.images(task.test, np.arange(EXAMPLES))
    measure = make_measure(task.model, images)
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


def draw(record: dict[str, Any]) -> Figure:
    """Draw the percentiles against the steps, one panel a standard deviation."""
    result = record["result"]
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
    panels[0].set_ylabel("singular values")
    figure.suptitle(
        "MNIST, the Jacobian of hidden layer 3 by hidden layer 2 at "
        f"{POINTS} examples, one seed"
    )
    handles = panels[0].get_legend_handles_labels()
    title = "bands: 5th to 95th percentile"
    figure.legend(*handles, loc="outside lower center", ncols=4, title=title)
    return figure


if __name__ == "__main__":
    run_command(reproduce)
