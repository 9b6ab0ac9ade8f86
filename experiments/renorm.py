"""Batch renormalization and batch normalization on batches with poor statistics.

    python -m experiments.renorm

Trains the network of the `mnist` preset, with initial weights of 0.1, on batches of 2,
of 4, and of 32 images of one class each, with batch normalization, with batch
renormalization and without normalization. Every run uses the same number of examples,
at a learning rate in proportion to the batch (0.5 for 64), and the running statistics
cover the same number of examples (momentum 0.99 for 64). r_max and d_max rise as in the
paper, at the same fractions of the run: from 1 and 0 after a sixteenth to 3 after a
half and to 5 after five sixteenths. The accuracies are with the running statistics.
Writes experiments/results/renorm.json. Takes about three minutes on two CPU cores; a
second start trains only runs that are not in runs/experiments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.figures import WITH, WITHOUT
from benchmarks.report import markdown, percent, run_command
from bnjax.data.sources import open_data
from bnjax.linen import BatchNorm
from bnjax.training.config import Config
from bnjax.variants.renorm import BatchRenorm
from experiments.runs import finish, median, once, preset, rounded

RENORM = "with batch renormalization"
NETWORKS = {WITH: BatchNorm, RENORM: BatchRenorm, WITHOUT: None}
REFERENCE, RATE, MOMENTUM, STD, HIDDEN = 64, 0.5, 0.99, 0.1, (100, 100, 100)
CHUNK = 500


class Case(NamedTuple):
    """Examples in a batch, and whether they are of one class."""

    size: int
    one_class: bool = False


CASES = {"2": Case(2), "4": Case(4), "32 of one class": Case(32, one_class=True)}


class Network(nn.Module):
    """Dense layers and sigmoids, each with a normalization or with a bias."""

    norm: Any
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits of images, shape (batch, pixels)."""
        for size in HIDDEN:
            dense = nn.Dense(
                size,
                use_bias=self.norm is None,
                kernel_init=nn.initializers.normal(STD),
            )
            x = dense(x)
            if self.norm is not None:
                x = self.norm(use_running_average=not train)(x)
            x = nn.sigmoid(x)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(STD))(x)


def reproduce(
    seeds: int = 3, examples: int = 64_000, cases: tuple[str, ...] = tuple(CASES)
) -> None:
    """Train, measure and write.

    Args:
        seeds: How many runs of each network and kind of batch.
        examples: Seen by each run.
        cases: Kinds of batches.
    """
    result: dict[str, Any] = {
        case: {
            network: [
                once(
                    f"renorm-{case}-{network}".replace(" ", "_"),
                    settings(CASES[case], examples, seed),
                    functools.partial(accuracy, CASES[case], network),
                )
                for seed in range(seeds)
            ]
            for network in NETWORKS
        }
        for case in cases
    }
    rows = [
        [case, *(told(result[case][network]) for network in NETWORKS)] for case in cases
    ]
    print(markdown(["batch", *NETWORKS], rows))
    finish("renorm", {"examples_seen": examples, "runs": result}, range(seeds))


def settings(case: Case, examples: int, seed: int) -> Config:
    """Return the data, the steps and the rate of a run as a configuration."""
    share = case.size / REFERENCE
    changes = {
        "batch_size": case.size,
        "steps": examples // case.size,
        "learning_rate": RATE * share,
        "seed": seed,
        "model.weight_std": STD,
        "bn.momentum": MOMENTUM**share,
    }
    return preset("mnist", changes)


def layer(network: str, steps: int, momentum: float) -> Any:
    """Return the normalization of a network, to be called with its mode."""
    if NETWORKS[network] is None:
        return None
    options: dict[str, Any] = {"momentum": momentum, "unbiased": True}
    if network == RENORM:
        start = steps // 16
        options |= {
            "r_max": optax.linear_schedule(1.0, 3.0, steps // 2 - start, start),
            "d_max": optax.linear_schedule(0.0, 5.0, 5 * steps // 16 - start, start),
        }
    return functools.partial(NETWORKS[network], **options)


def rows_of(case: Case, labels: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Return which examples each step sees, shape (steps, size)."""
    rng = np.random.default_rng(seed)
    if not case.one_class:
        epochs = -(-steps * case.size // len(labels))
        order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
        return order[: steps * case.size].reshape(steps, case.size)
    by_class = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    chosen = rng.integers(len(by_class), size=steps)
    return np.stack([rng.choice(by_class[label], case.size) for label in chosen])


def accuracy(case: Case, network: str, config: Config) -> dict[str, Any]:
    """Train one network; return its test accuracy by the running statistics."""
    source = open_data(config.data, config.data_dir)
    train, test = (source.load(name, lambda *_: None) for name in ("train", "test"))
    images = jnp.asarray(train.images).reshape(len(train.labels), -1)
    labels = jnp.asarray(train.labels)
    model = Network(
        layer(network, config.steps, config.bn.momentum), int(labels.max()) + 1
    )
    x = jnp.zeros((2, images.shape[1]))
    variables = model.init(jax.random.key(config.seed), x, train=True)

    def step(state, rows):
        params, stats = state

        def loss(params):
            given = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(
                given, images[rows] / 255, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, labels[rows]
            )
            return losses.mean(), updates.get("batch_stats", {})

        grads, stats = jax.grad(loss, has_aux=True)(params)
        rate = config.learning_rate
        return (jax.tree.map(lambda p, g: p - rate * g, params, grads), stats), None

    advance = jax.jit(lambda state, rows: jax.lax.scan(step, state, rows)[0])
    state = variables["params"], variables.get("batch_stats", {})
    rows = rows_of(case, np.asarray(labels), config.steps, config.seed)
    for start in range(0, config.steps, CHUNK):
        state = advance(state, rows[start : start + CHUNK])
    logits = model.apply(
        {"params": state[0], "batch_stats": state[1]},
        jnp.asarray(test.images).reshape(len(test.labels), -1) / 255,
        train=False,
    )
    correct = np.argmax(logits, axis=-1) == np.asarray(test.labels)
    return {"test_accuracy": rounded(float(correct.mean()))}


def told(runs: list[dict[str, Any]]) -> str:
    """Return the median, the lowest and the highest accuracy in percent."""
    found = [run["test_accuracy"] for run in runs]
    shown = map(percent, (median(found), min(found), max(found)))
    return "{} ({} to {})".format(*shown)


if __name__ == "__main__":
    run_command(reproduce)
