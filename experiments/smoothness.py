"""Does batch normalization reduce covariate shift, and does it smooth the loss?

    python -m experiments.smoothness

Trains two networks: the network of the `mnist` preset with initial weights of 0.1, and
LeNet with ReLU on CIFAR-10 (JPEG). Each network is trained without batch normalization,
with batch normalization, and with batch normalization and noise after it, which shifts
and scales each unit differently in every step. Twenty times in a run, before a step and
on its batch, it measures how the loss and its gradient change along the gradient, from
half to four times the learning rate, and how far the step of the layers below turns the
gradient of each layer. Writes experiments/results/smoothness.json and
docs/figures/smoothness.png. Takes about eight minutes on two CPU cores; a second start
trains only runs that are not in runs/experiments. CIFAR-10 (JPEG) must be prepared: see
docs/programs/data.md.

References:
    Santurkar et al. (2018), "How Does Batch Normalization Help Optimization?".
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.figures import (
    COLORS,
    WITH,
    WITHOUT,
    Figure,
    plot_median,
    seeds_of,
    thousands,
)
from benchmarks.report import run_command
from bnjax._validate import as_activation
from bnjax.diagnostics import BatchNoise, covariate_shift, loss_smoothness
from bnjax.models import Normalization
from bnjax.training.config import Config
from bnjax.training.presets.cifar10 import IMAGES
from experiments.runs import CIFAR10, Task, finish, median, once, preset, rounded

NOISY = "with, and noise after it"
NETWORKS = (WITHOUT, WITH, NOISY)
PALETTE = {**COLORS, NOISY: "C1"}
MNIST, CIFAR = "MNIST", "CIFAR-10 (JPEG)"
STEPS = {MNIST: 2000, CIFAR: 1000}
TIMES = 20
MULTIPLES = np.geomspace(0.5, 4, 8)
"""Step sizes along the gradient, over the learning rate."""


@dataclasses.dataclass(frozen=True)
class NoisyNormalization(Normalization):
    """Batch normalization, noise of each unit's own in training, nonlinearity."""

    def __call__(
        self, x: jax.Array, *, train: bool, activation: str, name: str, **options: Any
    ) -> jax.Array:
        """Return activation(noise(BN(x)))."""
        x = super().__call__(
            x, train=train, activation="identity", name=name, **options
        )
        x = BatchNoise(axis=-1, name=f"{name}_noise")(x, deterministic=not train)
        activate = as_activation(activation)
        return x if activate is None else activate(x)


NORMALIZATIONS = {
    WITHOUT: Normalization("none"),
    WITH: Normalization(),
    NOISY: NoisyNormalization(),
}


def settings(data: str, seed: int) -> Config:
    """Return the run of a data set."""
    changes = {"steps": STEPS[data], "seed": seed, "batch_size": 60}
    if data == MNIST:
        return preset("mnist", changes | {"model.weight_std": 0.1})
    images: Any = {f"data.{name}": IMAGES[name] for name in ("mean", "std")}
    changes |= {"data.name": CIFAR10, "learning_rate": 0.05} | images
    changes |= {"model.activation": "relu", "model.pool": "max"}
    return preset("lenet", changes)


def reproduce(seeds: int = 3) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many runs of each network.
    """
    runs: dict[str, Any] = {
        data: {
            name: [
                once(
                    f"smoothness-{NETWORKS.index(name)}",
                    settings(data, seed),
                    functools.partial(measured, data, name),
                )
                for seed in range(seeds)
            ]
            for name in NETWORKS
        }
        for data in (MNIST, CIFAR)
    }
    table = {
        data: {name: summary(each) for name, each in networks.items()}
        for data, networks in runs.items()
    }
    finish("smoothness", {"table": table, "runs": runs}, range(seeds), draw)


def measured(data: str, name: str, config: Config) -> dict[str, Any]:
    """Train one network; return what was measured on the way, and its accuracy."""
    task = make_task(data)
    model, loss_fn, step = make_network(data, name)
    layers = layers_of(data, name)
    rates = config.learning_rate * MULTIPLES
    images = task.images(task.train, np.arange(1))
    variables = model.init(jax.random.key(config.seed), images, train=False)
    found: dict[str, list[Any]] = {}
    for number, batch in enumerate(batches(task, config)):
        stepped = step(variables, batch, config.learning_rate)
        if number % (config.steps // TIMES) == 0:
            smooth = loss_smoothness(loss_fn, variables, batch, rates)
            new = stepped["params"]
            shift = covariate_shift(loss_fn, variables, new, batch, layers)
            values = {
                "step": number,
                "loss": smooth.loss,
                "losses_on_the_line": smooth.losses,
                "gradient_norm": smooth.gradient_norm,
                "largest_change_of_gradient": smooth.gradient_predictiveness[1],
                "beta": smooth.beta,
                "shift_cosine": shift.cosine,
                "shift_over_gradient": shift.relative,
            }
            for key, value in values.items():
                numbers = np.vectorize(rounded)(np.asarray(value, np.float64))
                found.setdefault(key, []).append(numbers.tolist())
        variables = stepped
    labels = np.asarray(task.test.labels)
    predicted = [
        predict(model, variables, task.images(task.test, rows))
        for rows in np.array_split(np.arange(len(labels)), 10)
    ]
    accuracy = float(np.mean(np.concatenate(predicted) == labels))
    names = ["/".join(layer) for layer in layers]
    return found | {"layers": names, "test_accuracy": rounded(accuracy)}


@functools.cache
def make_task(data: str) -> Task:
    """Return the data, decoded once."""
    return Task(settings(data, 0))


@functools.cache
def make_network(data: str, name: str) -> tuple[Any, Any, Any]:
    """Return a network, its loss, and a step of plain gradient descent."""
    model = make_task(data).model.clone(normalization=NORMALIZATIONS[name])

    def apply(variables: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            variables,
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"noise": batch["noise"]},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), updated

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        return apply(variables, batch)[0]

    @jax.jit
    def step(variables: Any, batch: Any, rate: float) -> Any:
        gradient, updated = jax.grad(
            lambda params: apply({**variables, "params": params}, batch), has_aux=True
        )(variables["params"])
        updates = jax.tree.map(lambda g: -rate * g, gradient)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **updated, "params": params}

    return model, loss_fn, step


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Any, variables: Any, images: jax.Array) -> jax.Array:
    """Return the classes of images, by the running statistics."""
    return model.apply(variables, images, train=False).argmax(-1)


def batches(task: Task, config: Config) -> Iterator[dict[str, jax.Array]]:
    """Yield a batch and the key of its noise for each step, epoch after epoch."""
    rng, size = np.random.default_rng(config.seed), config.batch_size
    count = len(task.train.labels)
    key, rows = jax.random.key(config.seed), np.arange(0)
    for step in range(config.steps):
        if len(rows) < size:
            rows = rng.permutation(count)
        taken, rows = rows[:size], rows[size:]
        yield {
            "image": task.images(task.train, taken),
            "label": task.train.labels[taken],
            "noise": jax.random.fold_in(key, step),
        }


def layers_of(data: str, name: str) -> list[tuple[str, ...]]:
    """Return the layers, from the input to the output, by their modules."""
    hidden = [("dense_0", "bn_0"), ("dense_1", "bn_1"), ("dense_2", "bn_2")]
    if data == CIFAR:
        hidden = [("conv1",), ("conv2",), ("dense1", "bn1"), ("dense2", "bn2")]
    if name == WITHOUT:
        hidden = [layer[:1] for layer in hidden]
    return [*hidden, ("logits",)]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over seeds of means over the run, and each seed's accuracy.

    Of covariate shift, means over the layers above the first, which has none.
    """

    def of(name: str, measure: Any) -> dict[str, Any]:
        values = [float(measure(np.asarray(run[name]))) for run in runs]
        return {"median": median(values), "by_seed": [rounded(v) for v in values]}

    return {
        "range_of_loss": of("losses_on_the_line", lambda v: np.ptp(v, axis=1).mean()),
        "change_of_gradient": of("largest_change_of_gradient", np.mean),
        "beta_geometric_mean": of("beta", lambda v: np.exp(np.log(v).mean())),
        "shift_cosine": of("shift_cosine", lambda v: v[:, 1:].mean()),
        "shift_over_gradient": of("shift_over_gradient", lambda v: v[:, 1:].mean()),
        "loss_at_the_end": of("loss", lambda v: v[-TIMES // 4 :].mean()),
        "test_accuracy": of("test_accuracy", float),
    }


PANELS = {
    "range of the loss": (
        "losses_on_the_line",
        lambda v: np.ptp(v, axis=1),
    ),
    "change of the gradient": ("largest_change_of_gradient", np.asarray),
    "effective beta": ("beta", np.asarray),
    "cosine of G and G'": (
        "shift_cosine",
        lambda v: np.asarray(v)[:, 1:].mean(1),
    ),
}


def draw(record: dict[str, Any]) -> Figure:
    """Draw each measure against the steps, a row for each data set."""
    runs = record["result"]["runs"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    rows = figure.subplots(len(runs), len(PANELS), squeeze=False)
    for axes, title in zip(rows[0], PANELS, strict=True):
        axes.set_title(title)
    for row, (data, networks) in zip(rows, runs.items(), strict=True):
        for axes, (name, measure) in zip(row, PANELS.values(), strict=True):
            for network, each in networks.items():
                curves = [measure(run[name]) for run in each]
                color, steps = PALETTE[network], each[0]["step"]
                plot_median(axes, steps, curves, color, network)
            if name in ("largest_change_of_gradient", "beta"):
                axes.set_ylim(0, None)
            thousands(axes)
        row[0].set(yscale="log", ylabel=data)
    for axes in rows[-1]:
        axes.set_xlabel("steps of 60 examples")
    figure.suptitle(
        "Down the gradient by half to four times the learning rate; a layer's gradient "
        f"before (G) and after (G')\nthe step of the layers below, {seeds_of(record)}"
    )
    handles = rows[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    run_command(reproduce)
