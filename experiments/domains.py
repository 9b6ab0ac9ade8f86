"""One or two populations of statistics, and adaptation to images of another kind.

    python -m experiments.domains

Trains networks of three layers of 100 ReLUs on MNIST for 1,000 steps of 128 images:

- On images of two kinds: half of each mini-batch is changed (inverted, or with noise).
  One population of running statistics serves both kinds, normalized together or
  separately; or there are two populations, with shared or separate scale and bias. The
  result is the accuracy on the test images of each kind.
- On unchanged images, tested on images with noise in test batches of 4 to 500. The
  statistics of training are blended with those of the batch, with a weight N from 0 to
  infinity (`bnjax.variants.adaptation`); or AdaBN re-estimates all statistics on 10,000
  training images with noise. The batches are random, or of one class each.

Writes experiments/results/domains.json. Takes about three minutes on two CPU cores; a
second start trains only runs that are not in runs/experiments.

References:
    Xie et al. (2020), "Adversarial examples improve image recognition"; Schneider et
    al. (2020), "Improving robustness against common corruptions by covariate shift
    adaptation"; Li et al. (2016), "Revisiting Batch Normalization For Practical Domain
    Adaptation".
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.report import markdown, percent, run_command
from bnjax.linen import BatchNorm
from bnjax.population import recompute_batch_stats
from bnjax.training.config import Config
from bnjax.variants.adaptation import AdaptiveBatchNorm
from bnjax.variants.domains import DomainBatchNorm
from experiments.runs import Task, changed, finish, median, once, preset, rounded

TOGETHER, APART = "one population", "one population, kinds apart"
SHARED, OWN = "two populations, one scale and bias", "two populations and scales"
LAYERS: dict[str, Any] = {
    TOGETHER: BatchNorm,
    APART: BatchNorm,
    SHARED: functools.partial(DomainBatchNorm, domains=2, share_affine=True),
    OWN: functools.partial(DomainBatchNorm, domains=2),
}
SIZES = (4, 20, 100, 500)
WEIGHTS = (0.0, 4.0, 16.0, 64.0, math.inf)
ADABN = "AdaBN"
TARGET, BATCHES = 250, 40


def inverted(images: jax.Array, _: jax.Array) -> jax.Array:
    """Return white for black."""
    return 1 - images


def noisy(images: jax.Array, key: jax.Array) -> jax.Array:
    """Add Gaussian noise of a deviation of 0.5."""
    return images + 0.5 * jax.random.normal(key, images.shape)


KINDS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "inverted": inverted,
    "noisy": noisy,
}


class Network(nn.Module):
    """Hidden layers of ReLUs, each normalized by a layer that is given."""

    norm: Any

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, **kind: Any) -> jax.Array:
        """Return logits; `kind` is what the normalization is told."""
        x = images.reshape(images.shape[0], -1)
        for i in range(3):
            x = nn.Dense(100, use_bias=False, name=f"dense_{i}")(x)
            x = self.norm(not train, momentum=0.95, activation="relu", name=f"bn_{i}")(
                x, **kind
            )
        return nn.Dense(10, name="logits")(x)


def reproduce(seeds: int = 3, steps: int = 1000) -> None:
    """Train, measure, write and print.

    Args:
        seeds: How many networks of each.
        steps: Of training.
    """
    changes = {"steps": steps, "batch_size": 128, "learning_rate": 0.1}
    base = preset("lenet-mnist", changes)
    runs = {
        name: [
            once(f"domains_{name}", changed(base, {"seed": seed}), measure)
            for seed in range(seeds)
        ]
        for name, measure in (("populations", populations), ("adaptation", adaptation))
    }
    given = {"sizes": SIZES, "weights": [f"{weight:g}" for weight in WEIGHTS]}
    finish("domains", given | runs | {"table": table(runs)}, range(seeds))
    print("\n\n".join(tables(runs)))


def train(
    config: Config,
    task: Task,
    name: str,
    change: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Any:
    """Return the variables of a network after training.

    Half of each mini-batch is changed where there is a `change`. The normalization is
    that of `LAYERS`.
    """
    network, half = Network(LAYERS[name]), config.batch_size // 2
    kind: Any = {"domain": np.repeat([0, 1], half)} if name in (SHARED, OWN) else {}
    tx = optax.sgd(config.learning_rate, momentum=0.9)
    keys = [jax.random.fold_in(jax.random.key(config.seed), i) for i in range(3)]
    images = task.images(task.train, np.arange(config.batch_size))
    variables = network.init(keys[0], images, train=True, **kind)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def loss(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array):
        parts = 2 if name == APART and change else 1
        losses = []
        for x, y in zip(
            jnp.split(images, parts), jnp.split(labels, parts), strict=True
        ):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, new = network.apply(
                variables, x, train=True, mutable=["batch_stats"], **kind
            )
            batch_stats = new["batch_stats"]
            losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, y))
        return jnp.mean(jnp.stack(losses)), batch_stats

    def step(arrays: Any, state: Any, key: jax.Array) -> tuple[Any, None]:
        params, batch_stats, momenta = state
        chosen, noise = jax.random.split(key)
        size = config.batch_size
        rows = jax.random.randint(chosen, (size,), 0, len(arrays.labels))
        images, labels = task.images(arrays, rows), arrays.labels[rows]
        if change is not None:
            images = images.at[half:].set(change(images[half:], noise))
        gradients, batch_stats = jax.grad(loss, has_aux=True)(
            params, batch_stats, images, labels
        )
        updates, momenta = tx.update(gradients, momenta)
        return (optax.apply_updates(params, updates), batch_stats, momenta), None

    @jax.jit
    def run(arrays: Any, state: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(functools.partial(step, arrays), state, keys)[0]

    state = params, batch_stats, tx.init(params)
    steps = jax.random.split(keys[1], config.steps)
    params, batch_stats, _ = run(task.train, state, steps)
    return {"params": params, "batch_stats": batch_stats}


def populations(config: Config) -> dict[str, Any]:
    """Return the accuracy on both kinds of images, by kind and normalization."""
    task, found = Task(config), {}
    labels = np.asarray(task.test.labels)
    clean = task.images(task.test, np.arange(len(labels)))
    for kind, change in KINDS.items():
        found[kind] = {}
        both = clean, change(clean, jax.random.key(100 + config.seed))
        for name, layer in LAYERS.items():
            variables = train(config, task, name, change)
            told = name in (SHARED, OWN)
            predict = jax.jit(functools.partial(Network(layer).apply, train=False))
            found[kind][name] = [
                accuracy(
                    predict(variables, images, **({"domain": i} if told else {})),
                    labels,
                )
                for i, images in enumerate(both)
            ]
    return {"accuracy": found}


def adaptation(config: Config) -> dict[str, Any]:
    """Return the accuracy on images with noise, by order, size and weight."""
    task = Task(config)
    variables = train(config, task, TOGETHER)
    labels = np.asarray(task.test.labels)
    clean = task.images(task.test, np.arange(len(labels)))
    images = noisy(clean, jax.random.key(100 + config.seed))

    @jax.jit
    def predict(variables: Any, batches: jax.Array, weight: Any) -> jax.Array:
        layer = functools.partial(AdaptiveBatchNorm, source_weight=weight)
        network = Network(layer)
        return jax.lax.map(lambda x: network.apply(variables, x, train=False), batches)

    def score(variables: Any, rows: np.ndarray, size: int, weight: float) -> float:
        rows = rows.reshape(-1, size)
        logits = predict(variables, images[rows], jnp.float32(weight))
        return accuracy(logits, labels[rows])

    network: Any = Network(BatchNorm)

    def call(variables: Any, x: jax.Array) -> Any:
        return network.apply(variables, x, train=True, mutable=["batch_stats"])

    random = np.random.default_rng(config.seed)
    rows = random.permutation(len(task.train.labels))[: TARGET * BATCHES]
    target = noisy(
        task.images(task.train, rows.reshape(BATCHES, -1)), jax.random.key(config.seed)
    )
    adapted = recompute_batch_stats(call, variables, target, method="pooled")
    orders = {
        "random": random.permutation(len(labels)),
        "by class": np.argsort(labels, kind="stable"),
    }
    adabn = variables | {"batch_stats": adapted}
    return {
        "without noise": accuracy(network.apply(variables, clean, train=False), labels),
        ADABN: score(adabn, orders["random"], TARGET, math.inf),
        "accuracy": {
            order: {
                str(size): [score(variables, rows, size, weight) for weight in WEIGHTS]
                for size in SIZES
            }
            for order, rows in orders.items()
        },
    }


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    """Return the share of logits that are largest at their label."""
    return rounded(float(np.mean(np.argmax(np.asarray(logits), -1) == labels)))


def table(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians over the runs, beside what is in them."""
    two, one = runs["populations"], runs["adaptation"]
    return {
        "populations": {
            kind: {
                name: [
                    median([run["accuracy"][kind][name][i] for run in two])
                    for i in range(2)
                ]
                for name in LAYERS
            }
            for kind in KINDS
        },
        "without noise": median([run["without noise"] for run in one]),
        ADABN: median([run[ADABN] for run in one]),
        "adaptation": {
            order: {
                str(size): [
                    median([run["accuracy"][order][str(size)][i] for run in one])
                    for i in range(len(WEIGHTS))
                ]
                for size in SIZES
            }
            for order in one[0]["accuracy"]
        },
    }


def tables(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the tables: medians, with the lowest and the highest of the seeds."""

    def cell(values: list[float]) -> str:
        spread = f"{percent(min(values))} to {percent(max(values))}"
        return f"{percent(median(values))} ({spread})"

    two, one = runs["populations"], runs["adaptation"]
    pairs = [(kind, i) for kind in KINDS for i in range(2)]
    first = markdown(
        ["statistics", *(f"{kind}: {('as is', kind)[i]}" for kind, i in pairs)],
        [
            [name, *(cell([r["accuracy"][k][name][i] for r in two]) for k, i in pairs)]
            for name in LAYERS
        ],
    )
    second = markdown(
        ["batches", *(f"N = {weight:g}" for weight in WEIGHTS)],
        [
            [
                f"{order}, {size}",
                *(
                    cell([r["accuracy"][order][str(size)][i] for r in one])
                    for i in range(len(WEIGHTS))
                ),
            ]
            for order in one[0]["accuracy"]
            for size in SIZES
        ],
    )
    rest = [[name, cell([r[name] for r in one])] for name in (ADABN, "without noise")]
    return [first, second, markdown(["", "accuracy"], rest)]


if __name__ == "__main__":
    run_command(reproduce)
