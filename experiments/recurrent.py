"""Recurrent batch normalization on MNIST, row by row and pixel by pixel.

    python -m experiments.recurrent

Trains an LSTM of 64 units with and without batch normalization, on images as sequences
of 28 rows and as sequences of 196 pixels. The pixels are of images averaged to 14x14,
not the paper's 784 pixels, and a run has a few hundred steps, not the paper's 100,000:
it shows how fast the first steps learn. As in the paper, the optimizer is RMSProp at
1e-3, gradients are clipped to a norm of 1, and training with normalization has initial
noise of 0.1. The accuracies are on the test set, with the running statistics. Writes
experiments/results/recurrent.json. Takes about four minutes on two CPU cores; a second
start trains only runs that are not in runs/experiments.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.figures import WITH, WITHOUT
from benchmarks.report import markdown, percent, run_command
from bnjax.data.sources import open_data
from bnjax.training.config import Config
from bnjax.variants.lstm_cells import RNN, BatchNormLSTMCell
from experiments.runs import finish, median, once, preset, rounded

ROWS, PIXELS = "rows (28 of 28)", "pixels (196 of a 14x14 average)"
STEPS = {ROWS: 800, PIXELS: 200}
SIZE, HIDDEN, EVALUATIONS, MOMENTUM = 64, 64, 4, 0.95
TESTED = 2000
"""Test examples: all of them would take as long as training."""


class Network(nn.Module):
    """An LSTM, and a dense layer on its last output."""

    batch_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, key: jax.Array) -> jax.Array:
        """Return the logits of sequences, shape (batch, time, inputs)."""
        if not self.batch_norm:
            return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(HIDDEN))(x)[:, -1])
        cell = BatchNormLSTMCell(
            HIDDEN,
            max_steps=x.shape[1],
            use_running_average=not train,
            momentum=MOMENTUM,
            unbiased=True,
            carry_init=nn.initializers.normal(0.1 if train else 0.0),
        )
        return nn.Dense(10)(RNN(cell)(x, init_key=key)[:, -1])


def reproduce(seeds: int = 3, tasks: tuple[str, ...] = tuple(STEPS)) -> None:
    """Train, measure and write.

    Args:
        seeds: How many runs of each network and task.
        tasks: What a sequence is made of.
    """
    result: dict[str, Any] = {
        task: {
            network: [
                once(
                    f"recurrent-{task.split()[0]}-{network}".replace(" ", "_"),
                    preset(
                        "mnist",
                        {"steps": STEPS[task], "batch_size": SIZE, "seed": seed},
                    ),
                    functools.partial(accuracies, task, network == WITH),
                )
                for seed in range(seeds)
            ]
            for network in (WITH, WITHOUT)
        }
        for task in tasks
    }
    header = ["sequence", "network", "step", "test accuracy (%)", "ms a step"]
    print(markdown(header, table(result)))
    finish("recurrent", result, range(seeds))


def sequences(task: str, images: Any) -> jax.Array:
    """Return images, uint8, as sequences of rows or of pixels from 0 to 1."""
    x = jnp.asarray(images).reshape(-1, 28, 28) / 255
    if task == ROWS:
        return x
    return x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196, 1)


def accuracies(task: str, batch_norm: bool, config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy after each quarter of the steps."""
    source = open_data(config.data, config.data_dir)
    train, test = (source.load(name, lambda *_: None) for name in ("train", "test"))
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    model, key = Network(batch_norm), jax.random.key(config.seed)
    x = sequences(task, images[:SIZE])
    variables = model.init(key, x, train=True, key=key)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-3))
    params, stats = variables["params"], variables.get("batch_stats", {})
    state = params, stats, optimizer.init(params)

    def step(state, rows_and_key):
        (params, stats, moments), (rows, key) = state, rows_and_key

        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats},
                sequences(task, images[rows]),
                train=True,
                key=key,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, labels[rows]
            )
            return losses.mean(), updates.get("batch_stats", {})

        grads, stats = jax.grad(loss, has_aux=True)(params)
        change, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, change), stats, moments), None

    advance = jax.jit(lambda state, given: jax.lax.scan(step, state, given)[0])
    predict = jax.jit(
        lambda params, stats, x: jnp.argmax(
            model.apply(
                {"params": params, "batch_stats": stats}, x, train=False, key=key
            ),
            axis=-1,
        )
    )
    order = np.random.default_rng(config.seed).permutation(len(labels))
    rows = order[: config.steps * SIZE].reshape(EVALUATIONS, -1, SIZE)
    keys = jax.random.split(key, rows.shape[:2])
    program = advance.lower(state, (rows[0], keys[0])).compile()
    tested, seconds = sequences(task, test.images[:TESTED]), 0.0
    found: dict[str, Any] = {"steps": [], "test_accuracy": []}
    for part in range(EVALUATIONS):
        started = time.perf_counter()
        state = jax.block_until_ready(program(state, (rows[part], keys[part])))
        seconds += time.perf_counter() - started
        correct = predict(*state[:2], tested) == test.labels[:TESTED]
        found["steps"].append((part + 1) * rows.shape[1])
        found["test_accuracy"].append(rounded(float(np.mean(correct))))
    return found | {"seconds_per_step": rounded(seconds / config.steps)}


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return rows of medians, and of the lowest and highest of the seeds."""
    rows = []
    for task, networks in result.items():
        for network, runs in networks.items():
            speed = f"{1e3 * median([run['seconds_per_step'] for run in runs]):.0f}"
            for at, step in enumerate(runs[0]["steps"]):
                found = [run["test_accuracy"][at] for run in runs]
                shown = map(percent, (median(found), min(found), max(found)))
                told = "{} ({} to {})".format(*shown)
                rows.append([task, network, str(step), told, speed])
    return rows


if __name__ == "__main__":
    run_command(reproduce)
