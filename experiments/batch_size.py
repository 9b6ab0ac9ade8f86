"""Where batch normalization stops working as the mini-batch shrinks.

    python -m experiments.batch_size

Trains the network of the `mnist` preset, its weights started at 0.1, with and without
batch normalization, on mini-batches of 2 to 256; of 1, normalization is refused.
Every run sees the same number of examples, at a learning rate in proportion to the
batch (0.5 for 64), and BN's running statistics look back over as many examples
(momentum 0.99 for 64), so that what changes with the batch is the noise of its
statistics. Writes experiments/results/batch_size.json and
docs/figures/batch_size.png. About six minutes on two CPU cores; started again, it
trains only what is not in runs/experiments.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.data.config import SettingError
from bnjax.data.sources import open_data
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from bnjax.training.program import build
from experiments.figures import COLORS, WITH, WITHOUT, new_figure, plot_median, save
from experiments.runs import once, rounded, visit

RESULT = ROOT / "experiments" / "results" / "batch_size.json"
NETWORKS = {WITH: True, WITHOUT: False}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
EXAMPLES = 128_000
REFERENCE = 64
RATE, MOMENTUM, STD = 0.5, 0.99, 0.1
INFERENCE, TRAINING = "running statistics", "statistics of the test batch"


def reproduce(seeds: int = 3, data_dir: Path | None = None) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many runs of each network and batch size.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    result: dict[str, Any] = {
        name: {
            str(size): [
                once("batch_size", settings(name, size, seed, data_dir), accuracies)
                for seed in range(seeds)
            ]
            for size in SIZES
        }
        for name in NETWORKS
    }
    command = " ".join(["python -m experiments.batch_size", *sys.argv[1:]])
    result |= {"examples_seen": EXAMPLES, "batch_of_1": refusal(data_dir)}
    write_result(RESULT, command, list(range(seeds)), result)
    print(f"{RESULT}\n{draw(result)}")


def settings(name: str, size: int, seed: int, data_dir: Path | None) -> Config:
    """Return a run of as many examples, as long steps and as long a memory."""
    base, share = PRESETS["mnist"].config, size / REFERENCE
    return dataclasses.replace(
        base,
        batch_norm=NETWORKS[name],
        batch_size=size,
        steps=EXAMPLES // size,
        learning_rate=RATE * share,
        log_every=500,
        seed=seed,
        data_dir=data_dir,
        model=dataclasses.replace(base.model, weight_std=STD),
        bn=dataclasses.replace(base.bn, momentum=MOMENTUM**share),
    )


def accuracies(config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy by both kinds of statistics."""
    (run,) = visit(config, [config.steps])
    source = open_data(config.data, config.data_dir)
    program = build(config, source)
    test = source.load("test", lambda *_: None)
    state, size = run.state, config.batch_size
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # In the set's own order, neighbours might be alike.
    order = np.random.default_rng(0).permutation(len(test.labels))

    def correct(rows: jax.Array, *, train: bool) -> jax.Array:
        batch = program.gather(test, rows)
        logits, _ = program.model.apply(
            variables, batch["image"], train=train, mutable=["batch_stats"]
        )
        return jnp.argmax(logits, axis=-1) == batch["label"]

    batches = order[: len(order) // size * size].reshape(-1, size)
    by_batch = jax.jit(lambda rows: jax.lax.map(lambda r: correct(r, train=True), rows))
    by_running = jax.jit(lambda rows: correct(rows, train=False))
    return {
        INFERENCE: rounded(float(np.mean(by_running(order)))),
        TRAINING: rounded(float(np.mean(by_batch(batches)))),
    }


def refusal(data_dir: Path | None) -> str:
    """Return what is said of batches of one example with normalization."""
    try:
        next(visit(settings(WITH, 1, 0, data_dir), [1]))
    except SettingError as error:
        return str(error)
    raise AssertionError("a batch of one example was taken")


def draw(result: dict[str, Any]) -> Path:
    """Draw the accuracies against the batch size."""
    figure, axes = new_figure()
    curves = (
        (WITH, INFERENCE, COLORS[WITH], f"with, {INFERENCE}"),
        (WITH, TRAINING, "C1", f"with, {TRAINING}"),
        (WITHOUT, INFERENCE, COLORS[WITHOUT], "without normalization"),
    )
    for name, mode, color, label in curves:
        sizes = [size for size in SIZES if mode in result[name][str(size)][0]]
        values = [
            [100 * run[mode] for run in result[name][str(size)]] for size in sizes
        ]
        median = plot_median(axes, sizes, np.transpose(values), color, label)
        axes.plot(sizes, median, "o", ms=4, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set(
        title=f"MNIST after {EXAMPLES:,} examples",
        xlabel="examples in a mini-batch (1: refused with normalization)",
        ylabel="test accuracy (%)",
    )
    seeds = len(result[WITH][str(SIZES[0])])
    axes.legend(loc="lower right", title=f"median and range of {seeds} seeds")
    return save(figure, "batch_size")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
