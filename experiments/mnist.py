"""Section 4.1 of the paper: MNIST with and without normalization, Figure 1.

    python -m experiments.mnist

Trains the `mnist` preset with and without batch normalization, once for each of five
seeds (Figure 1a), and records the percentiles of the inputs of the last hidden layer's
sigmoids (Figure 1b, c). Then trains both networks at other learning rates and standard
deviations of the weights, because the paper states neither. Writes
experiments/results/mnist.json and docs/figures/mnist.png. MNIST must be prepared
(docs/programs/training.md). Takes about ten minutes on two CPU cores; a second start
trains only runs that are not in runs/experiments.
"""

import functools
import time
from typing import Any

import jax
import numpy as np

from benchmarks.figures import (
    COLORS,
    WITH,
    WITHOUT,
    Figure,
    mark,
    new_figure,
    plot_median,
    seeds_of,
    thousands,
)
from benchmarks.report import percent, run_command
from bnjax.diagnostics import input_percentiles, movement, nonlinearity_inputs
from bnjax.training.config import Config
from bnjax.training.step import state_sha256
from experiments.runs import (
    Task,
    changed,
    finish,
    once,
    preset,
    rounded,
    run_once,
    variables_of,
    visit,
)

NETWORKS = {WITH: True, WITHOUT: False}
PRESET = (0.01, 0.5)  # std and learning rate of the preset mnist
EVERY = 500
EXAMPLES = 1000
PERCENTILES = (15, 50, 85)
# Test accuracy (%) after 10,000 and 50,000 steps by std and learning rate, one seed:
# what the project began with, from a program written apart from this one.
BEFORE = {
    (0.01, 0.01): {WITHOUT: (11.35, 11.35), WITH: (95.42, 97.44)},
    (0.01, 0.1): {WITHOUT: (11.35, 95.12), WITH: (96.47, 97.69)},
    (0.01, 0.5): {WITHOUT: (94.90, 96.68), WITH: (97.22, 97.91)},
    (0.1, 0.01): {WITHOUT: (52.73, 90.91), WITH: (91.22, 95.37)},
    (0.1, 0.1): {WITHOUT: (94.59, 97.06), WITH: (95.43, 97.34)},
    (0.1, 0.5): {WITHOUT: (96.98, 97.17), WITH: (97.18, 97.81)},
}


def reproduce(seeds: int = 5, steps: int = 50_000) -> None:
    """Train all networks, then write the result and the figure.

    Args:
        seeds: How many runs of each network at the preset's settings.
        steps: Of each run.
    """
    base = preset("mnist", {"steps": steps})
    runs = {
        name: [_trained(base, name, seed=seed) for seed in range(seeds)]
        for name in NETWORKS
    }
    inputs = {
        name: once(
            "mnist-inputs",
            changed(base, {"batch_norm": batch_norm}),
            percentiles_of_inputs,
        )
        for name, batch_norm in NETWORKS.items()
    }
    for name in NETWORKS:
        same = inputs[name]["state_sha256"] == runs[name][0]["state_sha256"]
        inputs[name]["same_run_as_seed_0"] = same
    settings = [
        {"weight_std": std, "learning_rate": rate, "network": name}
        | _beside(_trained(base, name, std=std, rate=rate), before[name])
        for (std, rate), before in BEFORE.items()
        for name in NETWORKS
    ]
    result = {
        "comparison": compare(runs),
        "settings": settings,
        "inputs_of_the_last_hidden_layer": inputs,
        "runs": runs,
    }
    finish("mnist", result, range(seeds), draw)


def _trained(
    base: Config,
    name: str,
    *,
    seed: int = 0,
    std: float = PRESET[0],
    rate: float = PRESET[1],
) -> dict[str, Any]:
    """Train one network, or take it from where it was kept."""
    changes = {"batch_norm": NETWORKS[name], "seed": seed}
    changes |= {"model.weight_std": std, "learning_rate": rate}
    measure = functools.partial(run_once, "mnist")
    return once("mnist", changed(base, changes), measure)


def percentiles_of_inputs(config: Config) -> dict[str, Any]:
    """Train one network, recording the inputs of the last layer's sigmoids.

    The percentiles are over the first examples of the test set, normalized by their own
    statistics, as a training step normalizes its batch. The unit shown is typical: the
    one whose median spans the median distance of the layer's.
    """
    task = Task(config)
    images = task.images(task.test, np.arange(EXAMPLES))
    layer = f"bn_{len(task.model.hidden) - 1}"

    @jax.jit
    def probe(variables: Any) -> jax.Array:
        return nonlinearity_inputs(task.model, variables, images, train=True)[layer]

    curves, spent = [], 0.0
    last: Any = None
    steps = list(range(0, config.steps + 1, EVERY))
    for run in visit(config, steps):
        variables = variables_of(run.state)
        if not curves:
            jax.block_until_ready(probe(variables))
        started = time.perf_counter()
        found = {layer: probe(variables)}
        curves.append(input_percentiles(found, PERCENTILES)[layer])
        spent += time.perf_counter() - started
        last = run
    moved = movement(np.asarray(curves))
    path, span = moved.path[1], moved.span[1]
    width = np.mean([curve[2] - curve[0] for curve in curves], axis=0)
    unit = int(np.argsort(span)[len(span) // 2])
    return {
        "layer": layer,
        "steps": steps,
        "typical_unit": unit,
        "percentiles": {
            f"{p}": [rounded(float(curve[i, unit])) for curve in curves]
            for i, p in enumerate(PERCENTILES)
        },
        "typical_unit_median_path": rounded(path[unit]),
        "typical_unit_median_span": rounded(span[unit]),
        "all_units_median_path": _spread(path),
        "all_units_median_span": _spread(span),
        "all_units_span_over_mean_width": _spread(span / width),
        "recording_share_of_training_time": rounded(spent / last.seconds),
        "state_sha256": state_sha256(last.state),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, PERCENTILES)
    return {"15": rounded(low), "50": rounded(median), "85": rounded(high)}


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return where the network with BN is above the one without, and how fast."""
    steps = runs[WITH][0]["steps"]
    accuracy = {
        name: np.asarray([run["test_accuracy"] for run in each])
        for name, each in runs.items()
    }
    median = {name: np.median(each, axis=0) for name, each in accuracy.items()}
    below = accuracy[WITH] <= accuracy[WITHOUT]
    last = median[WITHOUT][-1]
    reached = np.flatnonzero(median[WITH] >= last)
    return {
        "final_test_accuracy_median": {k: rounded(v[-1]) for k, v in median.items()},
        "final_test_accuracy_range": {
            name: [rounded(each[:, -1].min()), rounded(each[:, -1].max())]
            for name, each in accuracy.items()
        },
        "steps_where_median_with_is_not_above": [
            step
            for step, a, b in zip(steps, median[WITH], median[WITHOUT], strict=True)
            if a <= b
        ],
        "steps_where_with_is_not_above_by_seed": {
            str(run["seed"]): np.asarray(steps)[row].tolist()
            for run, row in zip(runs[WITH], below, strict=True)
        },
        "steps_with_to_reach_final_without": (
            steps[reached[0]] if reached.size else None
        ),
    }


def _beside(run: dict[str, Any], before: tuple[float, float]) -> dict[str, Any]:
    """Return a run's accuracies (%) beside those known before."""
    at = dict(zip(run["steps"], run["test_accuracy"], strict=True))
    last = 100 * run["final_test_accuracy"]
    return {
        "accuracy_at_10000": rounded(100 * at[10_000]) if 10_000 in at else None,
        "accuracy_at_end": rounded(last),
        "known_at_10000": before[0],
        "known_at_50000": before[1],
        "difference_at_end": rounded(round(last - before[1], 2)),
        "state_sha256": run["state_sha256"],
    }


def draw(record: dict[str, Any]) -> Figure:
    """Draw Figure 1: accuracy, and the percentiles without and with normalization."""
    result = record["result"]
    figure, (left, *others) = new_figure(3, width_ratios=(1.5, 1, 1))
    steps = result["runs"][WITH][0]["steps"]
    for name, each in result["runs"].items():
        accuracy = [[100 * value for value in run["test_accuracy"]] for run in each]
        median = plot_median(left, steps, accuracy, COLORS[name], name)
        end = (steps[-1], median[-1])
        mark(left, end, f"{percent(median[-1] / 100)} %", COLORS[name])
    left.set(
        title="(a) test accuracy on MNIST",
        xlabel="training steps of 60 examples",
        ylabel="test accuracy (%)",
        xlim=(0, steps[-1] * 1.18),
        ylim=(80, 100),
    )
    left.legend(loc="lower right", title=seeds_of(record))
    for axes, name, letter in zip(others, (WITHOUT, WITH), "bc", strict=True):
        found = result["inputs_of_the_last_hidden_layer"][name]
        low, median, high = (found["percentiles"][f"{p}"] for p in PERCENTILES)
        color, steps = COLORS[name], found["steps"]
        axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        axes.plot(steps, median, color=color)
        axes.set(title=f"({letter}) {name}", xlabel="training steps, seed 0")
    others[0].set_ylabel("input of a sigmoid: median, 15 to 85 %")
    others[1].sharey(others[0])
    for axes in (left, *others):
        thousands(axes)
    return figure


if __name__ == "__main__":
    run_command(reproduce)
