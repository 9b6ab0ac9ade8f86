"""Adaptation to changed images by their statistics: AdaBN.

    python -m experiments.adabn

Trains LeNet (preset `lenet-mnist`, 1,000 steps) on MNIST and evaluates it on test
images that are changed in four ways. It normalizes by the statistics of training, or by
statistics re-estimated, for all layers or only for the first, on 10,000 training images
with the same change, without their labels. The parameters do not change. Writes
experiments/results/adabn.json and docs/figures/adabn.png. Takes about three minutes on
one CPU core; a second start trains only runs that are not in runs/experiments.

References:
    Li et al. (2016), "Revisiting Batch Normalization For Practical Domain Adaptation".
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.figures import Figure, mark, new_figure
from benchmarks.report import percent, run_command
from bnjax.population import recompute_batch_stats
from bnjax.training.config import Config
from experiments.runs import (
    Task,
    changed,
    finish,
    median,
    once,
    preset,
    variables_of,
    visit,
)

TRAINING, FIRST, ALL = (
    "of training",
    "first layer estimated again",
    "all estimated again",
)
LAYERS = {FIRST: "conv1/*", ALL: None}
COLORS = {TRAINING: "C7", FIRST: "C1", ALL: "C0"}
SIZE, BATCHES = 250, 40


def noisy(images: jax.Array) -> jax.Array:
    """Add Gaussian noise of a deviation of 0.5, the same for the same number."""
    return images + 0.5 * jax.random.normal(jax.random.key(0), images.shape)


def blurred(images: jax.Array) -> jax.Array:
    """Average over squares of seven by seven pixels."""
    window = (1, 7, 7, 1)[: images.ndim]
    total = jax.lax.reduce_window(
        images, 0.0, jax.lax.add, window, (1,) * images.ndim, "SAME"
    )
    return total / 49


DOMAINS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "as trained": lambda images: images,
    "faint (0.4 + x / 5)": lambda images: 0.4 + images / 5,
    "noisy": noisy,
    "blurred": blurred,
    "inverted (1 - x)": lambda images: 1 - images,
}


def reproduce(seeds: int = 3, steps: int = 1000) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many networks.
        steps: Of training.
    """
    base = preset("lenet-mnist", {"steps": steps})
    runs = [
        once("adabn", changed(base, {"seed": seed}), accuracies)
        for seed in range(seeds)
    ]
    finish("adabn", {"runs": runs, "median": table(runs)}, range(seeds), draw)


def accuracies(config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy by domain and statistics."""
    (run,) = visit(config, [config.steps])
    task, variables = Task(config, SIZE), variables_of(run.state)
    order = np.random.default_rng(config.seed).permutation(len(task.train.labels))
    rows = order[: SIZE * BATCHES].reshape(BATCHES, SIZE)
    found: dict[str, Any] = {}
    for domain, change in DOMAINS.items():
        target = [change(task.images(task.train, part)) for part in rows]
        found[domain] = {TRAINING: task.accuracy(variables, change)}
        for name, layers in LAYERS.items():
            stats = recompute_batch_stats(task.call, variables, target, layers=layers)
            adapted = variables | {"batch_stats": stats}
            found[domain][name] = task.accuracy(adapted, change)
    return {"accuracy": found}


def table(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median accuracy over the runs, by domain and statistics."""
    return {
        domain: {
            name: median([run["accuracy"][domain][name] for run in runs])
            for name in COLORS
        }
        for domain in DOMAINS
    }


def draw(record: dict[str, Any]) -> Figure:
    """Draw the medians as bars, the runs as points on them."""
    result = record["result"]
    figure, axes = new_figure()
    width = 0.8 / len(COLORS)
    for i, (name, color) in enumerate(COLORS.items()):
        at = np.arange(len(DOMAINS)) + (i - 1) * width
        medians = [result["median"][domain][name] for domain in DOMAINS]
        axes.bar(at, np.multiply(100, medians), 0.9 * width, color=color, label=name)
        points = [
            [100 * run["accuracy"][domain][name] for domain in DOMAINS]
            for run in result["runs"]
        ]
        axes.plot(at, np.transpose(points), ".", color="k", ms=3)
        for x, top, bar in zip(at, np.max(points, axis=0), medians, strict=True):
            mark(axes, (x, top), percent(bar), "k", (0, 3), fontsize=7)
    axes.set_xticks(range(len(DOMAINS)), list(DOMAINS))
    axes.set(
        title="LeNet trained on MNIST, evaluated on changed images",
        ylabel="test accuracy (%)",
        ylim=(0, 109),
    )
    figure.legend(
        loc="outside lower center",
        ncols=3,
        title=f"statistics; bars: medians, points: {len(record['seeds'])} seeds",
    )
    return figure


if __name__ == "__main__":
    run_command(reproduce)
