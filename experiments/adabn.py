"""Adaptation to other images by their statistics alone: AdaBN.

    python -m experiments.adabn

Trains LeNet (preset `lenet-mnist`, 1,000 steps) on MNIST and evaluates it on the test
images changed in four ways: with the statistics of training, and with those estimated
again, for all layers or for the first alone, on 10,000 training images changed in the
same way, without their labels. The parameters stay as they are. Writes
experiments/results/adabn.json and docs/figures/adabn.png. About two minutes on one CPU
core; started again, it trains only what is not in runs/experiments.

References:
    Li et al. (2016), "Revisiting Batch Normalization For Practical Domain Adaptation".
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.data.sources import open_data
from bnjax.population import recompute_batch_stats
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from bnjax.training.program import build
from experiments.figures import new_figure, save
from experiments.runs import once, rounded, visit

RESULT = ROOT / "experiments" / "results" / "adabn.json"
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


def reproduce(seeds: int = 3, steps: int = 1000, data_dir: Path | None = None) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many networks.
        steps: Of training.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    base = dataclasses.replace(
        PRESETS["lenet-mnist"].config, steps=steps, data_dir=data_dir
    )
    runs = [
        once("adabn", dataclasses.replace(base, seed=seed), accuracies)
        for seed in range(seeds)
    ]
    result = {"runs": runs, "median": table(runs)}
    command = " ".join(["python -m experiments.adabn", *sys.argv[1:]])
    write_result(RESULT, command, list(range(seeds)), result)
    print(f"{RESULT}\n{draw(result)}")


def accuracies(config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy by domain and statistics."""
    (run,) = visit(config, [config.steps])
    source = open_data(config.data, config.data_dir)
    program = build(config, source)
    train, test = (
        jax.device_put(source.load(name, lambda *_: None)) for name in ("train", "test")
    )
    gather = jax.jit(program.gather)
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}

    def call(variables: Any, images: jax.Array) -> Any:
        return program.model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )

    @jax.jit
    def predicted(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(program.model.apply(variables, images, train=False), axis=-1)

    order = np.random.default_rng(config.seed).permutation(len(train.labels))
    rows = order[: SIZE * BATCHES].reshape(BATCHES, SIZE)
    tests = np.arange(len(test.labels)).reshape(-1, SIZE)
    labels = np.asarray(test.labels).reshape(tests.shape)

    def accuracy(change: Callable[[jax.Array], jax.Array], stats: Any) -> float:
        adapted = {**variables, "batch_stats": stats}
        right = [
            predicted(adapted, change(gather(test, part)["image"])) == truth
            for part, truth in zip(tests, labels, strict=True)
        ]
        return rounded(float(np.mean(right)))

    found: dict[str, Any] = {}
    for domain, change in DOMAINS.items():
        target = [change(gather(train, part)["image"]) for part in rows]
        found[domain] = {TRAINING: accuracy(change, variables["batch_stats"])}
        for name, layers in LAYERS.items():
            stats = recompute_batch_stats(call, variables, target, layers=layers)
            found[domain][name] = accuracy(change, stats)
    return {"accuracy": found}


def table(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median accuracy over the runs, by domain and statistics."""
    return {
        domain: {
            name: rounded(
                float(np.median([run["accuracy"][domain][name] for run in runs]))
            )
            for name in COLORS
        }
        for domain in DOMAINS
    }


def draw(result: dict[str, Any]) -> Path:
    """Draw the medians as bars, the runs as points on them."""
    figure, axes = new_figure()
    width = 0.8 / len(COLORS)
    places = np.arange(len(DOMAINS))
    for i, (name, color) in enumerate(COLORS.items()):
        at = places + (i - 1) * width
        bars = [100 * result["median"][domain][name] for domain in DOMAINS]
        axes.bar(at, bars, 0.9 * width, color=color, label=name)
        for run in result["runs"]:
            points = [100 * run["accuracy"][domain][name] for domain in DOMAINS]
            axes.plot(at, points, ".", color="k", ms=3)
    axes.set_xticks(places, list(DOMAINS))
    axes.set(title="LeNet trained on MNIST", ylabel="test accuracy (%)", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=3, title="statistics")
    return save(figure, "adabn")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
