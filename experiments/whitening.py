"""Whitening instead of batch normalization, on the MNIST network.

    python -m experiments.whitening

Trains the network of the `mnist` preset with batch normalization, and with whitening of
groups of 10 and of 50 of its 100 units, by ZCA and by five steps of Newton's method,
for the same number of steps on the same batches of 60. Measures the test accuracy with
running statistics and, to separate their effect from the learned network, with the
statistics of test batches of 1,000. Writes experiments/results/whitening.json. Takes
about three minutes on two CPU cores; a second start trains only runs that are not in
runs/experiments.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.report import run_command
from bnjax.models import Normalization
from bnjax.training.config import Config
from bnjax.variants.whitening.linen import WhiteningBatchNorm
from experiments.runs import (
    Task,
    changed,
    finish,
    median,
    once,
    preset,
    rounded,
    variables_of,
    visit,
)

BATCH_NORM = "batch normalization"
NETWORKS = {
    BATCH_NORM: "batch_norm",
    "ZCA, groups of 10": "zca_10",
    "Newton, groups of 10": "newton_10",
    "ZCA, groups of 50": "zca_50",
    "Newton, groups of 50": "newton_50",
}
STEPS = (250, 500, 1000, 2000)
TEST_BATCH = 1000
RUNNING, BATCH = "running statistics", "statistics of the test batch"


class Whitened(nn.Module):
    """`bnjax.models.MLP` with whitening in place of its normalization."""

    group_size: int
    iterations: int | None
    classes: int
    normalization: Normalization
    hidden: Sequence[int]
    weight_std: float = 0.01

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits."""
        kernel_init = nn.initializers.normal(self.weight_std)
        given = self.normalization
        z = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.hidden):
            z = nn.Dense(
                width, use_bias=False, kernel_init=kernel_init, name=f"dense_{i}"
            )(z)
            z = WhiteningBatchNorm(
                use_running_average=not train,
                group_size=self.group_size,
                iterations=self.iterations,
                momentum=given.momentum,
                epsilon=given.epsilon,
                unbiased=given.unbiased,
                activation="sigmoid",
                name=f"bn_{i}",
            )(z)
        return nn.Dense(self.classes, kernel_init=kernel_init, name="logits")(z)


zca_10 = functools.partial(Whitened, 10, None)
newton_10 = functools.partial(Whitened, 10, 5)
zca_50 = functools.partial(Whitened, 50, None)
newton_50 = functools.partial(Whitened, 50, 5)


def reproduce(seeds: int = 3) -> None:
    """Train, measure and write.

    Args:
        seeds: How many runs of each network.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NETWORKS}
    # In turn, so that a busy machine is as slow for all.
    for seed in range(seeds):
        for name in NETWORKS:
            runs[name].append(once("whitening", settings(name, seed), accuracies))
            print(name, seed, runs[name][-1][RUNNING], runs[name][-1][BATCH])
    result = {"steps": STEPS, "median": table(runs), "runs": runs}
    finish("whitening", result, range(seeds))


def settings(name: str, seed: int) -> Config:
    """Return a run of the preset with one of the layers."""
    config = preset("mnist", {"steps": STEPS[-1], "log_every": 250, "seed": seed})
    if name == BATCH_NORM:
        return config
    return changed(config, {"model.name": f"experiments.whitening:{NETWORKS[name]}"})


def accuracies(config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy by both kinds of statistics."""
    task = Task(config)
    found: dict[str, Any] = {RUNNING: [], BATCH: []}
    batches = np.random.default_rng(0).permutation(len(task.test.labels))
    batches = batches.reshape(-1, TEST_BATCH)

    @jax.jit
    def correct(variables: Any, rows: jax.Array) -> jax.Array:
        logits, _ = task.call(variables, task.images(task.test, rows))
        return jnp.mean(jnp.argmax(logits, axis=-1) == task.test.labels[rows])

    for run in visit(config, STEPS):
        variables = variables_of(run.state)
        found[RUNNING].append(task.accuracy(variables))
        shares = [float(correct(variables, rows)) for rows in batches]
        found[BATCH].append(rounded(float(np.mean(shares))))
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Return the medians over the seeds, at each of the steps."""
    return {
        name: {
            kind: [
                median(values) for values in zip(*(r[kind] for r in each), strict=True)
            ]
            for kind in (RUNNING, BATCH)
        }
        for name, each in runs.items()
    }


if __name__ == "__main__":
    run_command(reproduce)
