"""Steps per second of train.py's resident path, beside a plain Flax and PyTorch loop.

    python -m benchmarks.training_rate --torch-python PATH

All loops train the network of the mnist preset on MNIST with batches of 60. They run in
turns, in rounds with a rotating order, so that other work on the machine affects all of
them. The rates exclude compilation. The loops differ, and not only the layer, which
benchmarks.mnist_steps_per_second compares. The Flax loop calls one jitted step for each
batch, taken from a NumPy array. The PyTorch loop does the same, in a separate process
that waits while the other loops work. train.py is expected to make at least 1.2 times
the steps of the Flax loop and 3.5 times those of the PyTorch loop. "products" computes
only the matrix products of such a step: no loop of the same arithmetic can be faster.
Writes benchmarks/results/training_rate.json. MNIST must be prepared (see
docs/programs/training.md).
"""

import dataclasses
import functools
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from benchmarks import timing
from benchmarks.report import RESULTS, ROOT, command_of, run_command, write_result
from bnjax.data.config import SettingError
from bnjax.data.sources import Source, open_source
from bnjax.training.config import Config
from bnjax.training.loop import Run
from bnjax.training.presets import PRESETS

ASKED = {"flax loop": 1.2, "torch loop": 3.5}
TakeSteps = Callable[[int], None]


class Network(nn.Module):
    """The network as the examples of Flax write one."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits."""
        init = nn.initializers.normal(0.01)
        z = z.reshape(len(z), -1)
        for _ in range(3):
            z = nn.Dense(100, use_bias=False, kernel_init=init)(z)
            z = nn.sigmoid(nn.BatchNorm(use_running_average=False)(z))
        return nn.Dense(10, kernel_init=init)(z)


class State(TrainState):
    """Flax's, and running statistics."""

    batch_stats: Any


def preset(seed: int) -> Config:
    """Return the configuration of the preset `mnist`."""
    return dataclasses.replace(PRESETS["mnist"].config, seed=seed)


def train_loop(source: Source, config: Config) -> TakeSteps:
    """Return the loop of train.py."""
    run = Run(config, source)

    def take(steps: int) -> None:
        for _ in range(steps // config.log_every):
            run.dispatch(config.log_every)

    return take


def flax_loop(images: np.ndarray, labels: np.ndarray, config: Config) -> TakeSteps:
    model, batch = Network(), config.batch_size
    variables = model.init(jax.random.key(config.seed), images[:batch])
    state = State.create(
        apply_fn=model.apply, tx=optax.sgd(config.learning_rate), **variables
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, updated

        (loss, updated), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        state = state.apply_gradients(
            grads=gradients, batch_stats=updated["batch_stats"]
        )
        return state, loss

    random = np.random.default_rng(config.seed)
    rows: list[np.ndarray] = []

    def take(steps: int) -> None:
        nonlocal state, rows
        loss = jnp.zeros(())
        for _ in range(steps):
            if not rows:
                whole = len(labels) // batch * batch
                rows = list(random.permutation(len(labels))[:whole].reshape(-1, batch))
            chosen = rows.pop()
            state, loss = step(state, images[chosen], labels[chosen])
        loss.block_until_ready()

    return take


def products_loop(images: np.ndarray, config: Config) -> TakeSteps:
    """Return a loop of the matrix products of a step and nothing else: the bound."""
    key, batch = jax.random.key(config.seed), config.batch_size
    batches = jnp.asarray(images[: 50 * batch].reshape(50, batch, -1))
    sizes = [batches.shape[-1], 100, 100, 100, 10]
    weights = [
        jax.random.normal(key, shape) / 10 for shape in itertools.pairwise(sizes)
    ]

    def step(weights: list[jax.Array], z: jax.Array) -> tuple[list[jax.Array], None]:
        inputs = []
        for w in weights:
            inputs.append(z)
            z = z @ w
        gradients = []
        for w, x in zip(reversed(weights), reversed(inputs), strict=True):
            gradients.append(x.T @ z)
            if x is not inputs[0]:
                z = z @ w.T
        # Small enough to change no weight, too small to be left out.
        moved = [
            w + 1e-30 * g for w, g in zip(weights, reversed(gradients), strict=True)
        ]
        return moved, None

    @functools.partial(jax.jit, static_argnums=1)
    def steps_of(weights: list[jax.Array], epochs: int) -> list[jax.Array]:
        def epoch(weights: list[jax.Array], _: None) -> tuple[list[jax.Array], None]:
            return jax.lax.scan(step, weights, batches)

        return jax.lax.scan(epoch, weights, length=epochs)[0]

    def take(steps: int) -> None:
        jax.block_until_ready(steps_of(weights, steps // len(batches)))

    return take


def torch_loop(
    python: Path, folder: Path, images: np.ndarray, labels: np.ndarray, config: Config
) -> tuple[TakeSteps, subprocess.Popen[str]]:
    data = folder / "mnist.npz"
    np.savez(data, images=images, labels=labels)
    script = ROOT / "benchmarks" / "torch_loop.py"
    numbers = (config.seed, config.batch_size, config.learning_rate)
    child = subprocess.Popen(  # noqa: S603 (the person running this names it)
        [str(word) for word in (python, script, data, *numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def take(steps: int) -> None:
        if child.stdin is None or child.stdout is None:
            raise ValueError("the pipes are there")
        child.stdin.write(f"{steps}\n")
        child.stdin.flush()
        if not child.stdout.readline():
            raise SettingError(f"{python} ended: expected a Python that has torch.")

    return take, child


def compare(
    torch_python: Path | None = None,
    rounds: int = 21,
    steps: int = 1000,
    seed: int = 0,
) -> None:
    """Measure, print and write the rates.

    Args:
        torch_python: A Python that has torch. None: without PyTorch.
        rounds: Of each loop.
        steps: In a round, a multiple of the preset's --log-every and of 50.
        seed: Of the weights and the order of the data.
    """
    source = open_source("mnist")
    config = preset(seed)
    arrays = source.load("train", lambda *_: None)
    images = (np.asarray(arrays.images) > source.max_value / 2).astype(np.float32)
    labels = np.asarray(arrays.labels)
    loops = {
        "train.py": train_loop(source, config),
        "flax loop": flax_loop(images, labels, config),
        "products": products_loop(images, config),
    }
    with tempfile.TemporaryDirectory() as folder:
        child = None
        if torch_python is not None:
            loops["torch loop"], child = torch_loop(
                torch_python, Path(folder), images, labels, config
            )
        try:
            compare_loops("training_rate", loops, ASKED, rounds, steps, seed)
        finally:
            if child is not None:
                child.kill()
                child.wait()


def compare_loops(
    name: str,
    loops: dict[str, TakeSteps],
    asked: dict[str, float],
    rounds: int,
    steps: int,
    seed: int,
) -> None:
    """Time loops in turn; print and write their rates, and those over the first's.

    Args:
        name: of the benchmark.
        loops: what to time; the first is compared with the others.
        asked: the least ratios to some of the others.
        rounds: of each.
        steps: in a round.
        seed: of the result.
    """
    runs = {loop: functools.partial(take, steps) for loop, take in loops.items()}
    seconds = timing.interleaved(runs, rounds)
    rates = {loop: [steps / taken for taken in each] for loop, each in seconds.items()}
    ours, *others = rates
    result = {
        "steps_per_second_median": timing.medians(rates),
        "ratios": {
            f"{ours} over {other}": {
                "asked": asked.get(other),
                "median_of_rounds": timing.ratio(rates[ours], rates[other]),
            }
            for other in others
        },
        "rounds": rounds,
        "steps_per_round": steps,
        "steps_per_second": rates,
    }
    for loop, median in result["steps_per_second_median"].items():
        spread = f"{min(rates[loop]):,.0f} to {max(rates[loop]):,.0f}"
        print(f"{loop:10} {median:8,.0f} steps/s (median of {rounds}; {spread})")
    for pair, ratio in result["ratios"].items():
        print(f"{pair}: {ratio['median_of_rounds']:.3f} (asked: {ratio['asked']})")
    path = RESULTS / f"{name}.json"
    write_result(path, command_of(f"benchmarks.{name}"), [seed], result)
    print(path)


if __name__ == "__main__":
    run_command(compare)
