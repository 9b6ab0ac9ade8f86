"""Section 4.2 of the paper at the size of CIFAR-10: Figures 2 and 3.

    python -m experiments.cifar10

Trains the five networks of the paper, Inception with sigmoids and Inception at 5 times
the learning rate, all of an eighth of the width, after a sweep of the learning rate of
the network without normalization; the headline networks once for each of three seeds.
Then BN-x5 and BN-x5-Sigmoid in a fifth of the steps, with a decay as much faster.
Writes experiments/results/cifar10.json and docs/figures/cifar10.png. About 85 minutes
on one CPU core; started again, it trains only what is not in runs/experiments.
CIFAR-10 (JPEG) has to be prepared: see docs/data.md.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from experiments.figures import mark_end, new_figure, plot_median, save, thousands
from experiments.runs import once, rounded, run_once

RESULT = ROOT / "experiments" / "results" / "cifar10.json"
CACHE = ROOT / "runs" / "compiled"
BASELINE, HEADLINE = "Inception", "BN-x5"
RATES = (0.01, 0.03, 0.1)
"""Learning rates of the sweep."""
SWEEP_STEPS = 2500
CHANCE_STEPS = 2500
"""Of the two networks that the paper says learn nothing."""
FIFTH = ("BN-x5", "BN-x5-Sigmoid")
"""Trained in a fifth of the steps, too."""
# Steps to Inception's best, as a share of Inception's own, and best accuracy (%).
PAPER = {
    "Inception": (1.0, 72.2),
    "BN-Baseline": (13.3 / 31, 72.7),
    "BN-x5": (2.1 / 31, 73.0),
    "BN-x30": (2.7 / 31, 74.8),
    "BN-x5-Sigmoid": (None, 69.8),
    "Inception, sigmoids": (None, 0.1),
    "Inception, 5 times the rate": (None, None),
}
LABEL_GAP = 3.5
"""Points between the labels of two curves."""
COLORS = dict(zip(PAPER, ("C3", "C1", "C0", "C2", "C4", "C7", "C5"), strict=True))


def networks() -> dict[str, Config]:
    """Return the networks by the paper's names."""
    base = PRESETS["cifar10-inception"].config
    short = shortened(base, CHANCE_STEPS)
    sigmoids = dataclasses.replace(base.model, activation="sigmoid")
    return {
        "Inception": base,
        "BN-Baseline": PRESETS["cifar10-bn-baseline"].config,
        "BN-x5": PRESETS["cifar10-bn-x5"].config,
        "BN-x30": PRESETS["cifar10-bn-x30"].config,
        "BN-x5-Sigmoid": PRESETS["cifar10-bn-x5-sigmoid"].config,
        "Inception, sigmoids": dataclasses.replace(short, model=sigmoids),
        "Inception, 5 times the rate": dataclasses.replace(
            short, learning_rate=5 * base.learning_rate
        ),
    }


def shortened(config: Config, steps: int) -> Config:
    """Return a shorter run whose learning rate decays as far."""
    options = dict(config.optim.schedule_options)
    options["transition_steps"] = round(
        options["transition_steps"] * steps / config.steps
    )
    optim = dataclasses.replace(config.optim, schedule_options=options)
    return dataclasses.replace(config, steps=steps, optim=optim)


def trained(config: Config) -> dict[str, Any]:
    """Train one network, or take it from where it was kept."""
    cached = dataclasses.replace(config, compilation_cache=CACHE)
    return once("cifar10", cached, functools.partial(run_once, "cifar10"))


def reproduce(seeds: int = 3, data_dir: Path | None = None) -> None:
    """Train all networks, then write the result and the figure.

    Args:
        seeds: How many runs of the two headline networks; the others have one.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    configs = {
        name: dataclasses.replace(config, data_dir=data_dir)
        for name, config in networks().items()
    }
    base = configs[BASELINE]
    short = shortened(base, SWEEP_STEPS)
    sweep = [
        {"learning_rate": rate}
        | trained(dataclasses.replace(short, learning_rate=rate))
        for rate in RATES
    ]
    runs = {
        name: [
            trained(dataclasses.replace(config, seed=seed))
            for seed in range(seeds if name in (BASELINE, HEADLINE) else 1)
        ]
        for name, config in configs.items()
    }
    fifth = {name: shortened(configs[name], base.steps // 5) for name in FIFTH}
    short_runs = {
        name: [trained(dataclasses.replace(config, seed=seed)) for seed in range(seeds)]
        for name, config in fifth.items()
    }
    result = {
        "table": table(runs),
        "in_a_fifth_of_the_steps": {
            name: {
                "steps": config.steps,
                "decay_steps": config.optim.schedule_options["transition_steps"],
                "accuracy": [run["final_test_accuracy"] for run in short_runs[name]],
            }
            for name, config in fifth.items()
        },
        "examples_in_a_step": base.batch_size,
        "sweep_of_inception": sweep,
        "runs": runs | {f"{name}, a fifth": each for name, each in short_runs.items()},
    }
    command = " ".join(["python -m experiments.cifar10", *sys.argv[1:]])
    write_result(RESULT, command, list(range(seeds)), result)
    print(f"{RESULT}\n{draw(runs)}")


def table(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return best accuracies, and steps to the best of Inception, beside the paper's.

    Both are of the median over seeds. A network without evaluations, because its loss
    was no number before the first, has none.
    """
    steps, accuracy = _median(runs[BASELINE])
    best = accuracy.max()
    own = steps[accuracy.argmax()]
    rows = {}
    for name, each in runs.items():
        steps, accuracy = _median(each)
        reached = steps[accuracy >= best]
        share, paper_best = PAPER[name]
        rows[name] = {
            "seeds": len(each),
            "best_accuracy": rounded(accuracy.max()) if len(accuracy) else None,
            "final_accuracy_by_seed": [run["final_test_accuracy"] for run in each],
            "steps_to_best_of_inception": int(reached[0]) if len(reached) else None,
            "over_steps_of_inception": (
                rounded(reached[0] / own) if len(reached) else None
            ),
            "diverged": [run["diverged"] for run in each],
            "paper_best_accuracy": paper_best,
            "paper_over_steps_of_inception": share and rounded(share),
        }
    return rows


def _median(runs: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the median accuracy at each that all runs came to."""
    count = min(len(run["steps"]) for run in runs)
    accuracy = [run["test_accuracy"][:count] for run in runs]
    return np.asarray(runs[0]["steps"][:count]), np.median(accuracy, axis=0)


def draw(runs: dict[str, list[dict[str, Any]]]) -> Path:
    """Draw Figure 2: accuracy against steps, and where Inception's best is reached."""
    figure, axes = new_figure()
    ends = {}
    for name, each in runs.items():
        steps = each[0]["steps"]
        if not steps:
            continue
        accuracy = [[100 * value for value in run["test_accuracy"]] for run in each]
        median = plot_median(axes, steps, accuracy, COLORS[name], name)
        ends[name] = (steps[-1], median[-1])
    lowest = -np.inf
    for name in sorted(ends, key=lambda name: ends[name][1]):
        step, accuracy = ends[name]
        lowest = max(accuracy, lowest + LABEL_GAP)
        mark_end(axes, step, lowest, f"{name}: {accuracy:.1f} %", COLORS[name])
    steps, accuracy = _median(runs[BASELINE])
    axes.axhline(100 * accuracy.max(), color=COLORS[BASELINE], ls=":", lw=1)
    axes.set(
        title="CIFAR-10 (JPEG), Inception of an eighth of the width",
        xlabel="training steps of 32 examples",
        ylabel="test accuracy (%)",
        xlim=(0, 1.4 * steps[-1]),
    )
    thousands(axes)
    return save(figure, "cifar10")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
