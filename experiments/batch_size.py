"""The mini-batch size at which batch normalization stops working.

    python -m experiments.batch_size

Trains the network of the `mnist` preset, with initial weights of 0.1, with and without
batch normalization, on mini-batches of 2 to 256; normalization refuses batches of 1.
Every run uses the same number of examples, at a learning rate in proportion to the
batch (0.5 for 64). BN's running statistics also cover the same number of examples
(momentum 0.99 for 64). Only the noise of the statistics therefore changes with the
batch. Writes experiments/results/batch_size.json and docs/figures/batch_size.png. Takes
about six minutes on two CPU cores; a second start trains only runs that are not in
runs/experiments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import (
    COLORS,
    WITH,
    WITHOUT,
    Figure,
    new_figure,
    plot_median,
    seeds_of,
)
from benchmarks.report import run_command
from bnjax.data.config import SettingError
from bnjax.training.config import Config
from experiments.runs import Task, finish, once, preset, rounded, variables_of, visit

NETWORKS = {WITH: True, WITHOUT: False}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
EXAMPLES = 128_000
REFERENCE = 64
RATE, MOMENTUM, STD = 0.5, 0.99, 0.1
INFERENCE, TRAINING = "running statistics", "statistics of the test batch"


def reproduce(seeds: int = 3) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many runs of each network and batch size.
    """
    result: dict[str, Any] = {
        name: {
            str(size): [
                once("batch_size", settings(name, size, seed), accuracies)
                for seed in range(seeds)
            ]
            for size in SIZES
        }
        for name in NETWORKS
    }
    result |= {"examples_seen": EXAMPLES, "batch_of_1": refusal()}
    finish("batch_size", result, range(seeds), draw)


def settings(name: str, size: int, seed: int) -> Config:
    """Return a run of as many examples, as long steps and as long a memory."""
    share = size / REFERENCE
    changes = {
        "batch_norm": NETWORKS[name],
        "batch_size": size,
        "steps": EXAMPLES // size,
        "learning_rate": RATE * share,
        "log_every": 500,
        "seed": seed,
        "model.weight_std": STD,
        "bn.momentum": MOMENTUM**share,
    }
    return preset("mnist", changes)


def accuracies(config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy by both kinds of statistics."""
    (run,) = visit(config, [config.steps])
    task, size = Task(config), config.batch_size
    variables = variables_of(run.state)
    # In the order of the set, neighbors might be alike.
    order = np.random.default_rng(0).permutation(len(task.test.labels))
    batches = order[: len(order) // size * size].reshape(-1, size)

    def correct(rows: jax.Array) -> jax.Array:
        logits, _ = task.call(variables, task.images(task.test, rows))
        return jnp.argmax(logits, axis=-1) == task.test.labels[rows]

    by_batch = jax.jit(lambda batches: jax.lax.map(correct, batches))
    return {
        INFERENCE: task.accuracy(variables),
        TRAINING: rounded(float(np.mean(by_batch(batches)))),
    }


def refusal() -> str:
    """Return what is said of batches of one example with normalization."""
    try:
        next(visit(settings(WITH, 1, 0), [1]))
    except SettingError as error:
        return str(error)
    raise AssertionError("a batch of one example was taken")


def draw(record: dict[str, Any]) -> Figure:
    """Draw the accuracies against the batch size."""
    result = record["result"]
    figure, axes = new_figure()
    curves = (
        (WITH, INFERENCE, COLORS[WITH], f"with, {INFERENCE}"),
        (WITH, TRAINING, "C1", f"with, {TRAINING}"),
        (WITHOUT, INFERENCE, COLORS[WITHOUT], "without normalization"),
    )
    for name, mode, color, label in curves:
        runs = result[name].values()
        values = np.transpose([[100 * run[mode] for run in each] for each in runs])
        plot_median(axes, SIZES, values, color, label, marker="o", ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set(
        title=f"MNIST, the paper's network after {result['examples_seen']:,} examples",
        xlabel="examples in a mini-batch (1: refused with normalization)",
        ylabel="test accuracy (%)",
    )
    axes.legend(loc="lower right", title=seeds_of(record))
    return figure


if __name__ == "__main__":
    run_command(reproduce)
