"""Section 4.2 of the paper at the size of CIFAR-10: Figures 2 and 3.

    python -m experiments.cifar10

First sweeps the learning rate of the network without normalization. Then trains the
five networks of the paper, Inception with sigmoids and Inception at 5 times the
learning rate, all with an eighth of the width; the headline networks once for each of
three seeds. Finally trains BN-x5 and BN-x5-Sigmoid in a fifth of the steps, with a
decay five times as fast. Writes experiments/results/cifar10.json and
docs/figures/cifar10.png. Takes about 85 minutes on one CPU core; a second start trains
only runs that are not in runs/experiments. CIFAR-10 (JPEG) must be prepared: see
docs/programs/data.md.
"""

import functools
from typing import Any

import numpy as np

from benchmarks.figures import Figure, mark, new_figure, plot_median, thousands
from benchmarks.report import ROOT, percent, run_command
from bnjax.training.config import Config
from experiments.runs import changed, finish, once, preset, rounded, run_once

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
LIFTED = ("BN-x5", "Inception, 5 times the rate")
LOWERED = ("BN-Baseline", "Inception, sigmoids")
"""Whose labels in the figure make room for each other."""
COLORS = dict(zip(PAPER, ("C3", "C1", "C0", "C2", "C4", "C7", "C5"), strict=True))


def networks() -> dict[str, Config]:
    """Return the networks by the paper's names."""
    base = preset("cifar10-inception")
    short = shortened(base, CHANCE_STEPS)
    return {
        "Inception": base,
        "BN-Baseline": preset("cifar10-bn-baseline"),
        "BN-x5": preset("cifar10-bn-x5"),
        "BN-x30": preset("cifar10-bn-x30"),
        "BN-x5-Sigmoid": preset("cifar10-bn-x5-sigmoid"),
        "Inception, sigmoids": changed(short, {"model.activation": "sigmoid"}),
        "Inception, 5 times the rate": changed(
            short, {"learning_rate": 5 * base.learning_rate}
        ),
    }


def shortened(config: Config, steps: int) -> Config:
    """Return a shorter run whose learning rate decays as far."""
    decay = dict(config.optim.schedule_options)
    decay["transition_steps"] = round(decay["transition_steps"] * steps / config.steps)
    return changed(config, {"steps": steps, "optim.schedule_options": decay})


def trained(config: Config) -> dict[str, Any]:
    """Train one network, or take it from where it was kept."""
    cached = changed(config, {"compilation_cache": CACHE})
    return once("cifar10", cached, functools.partial(run_once, "cifar10"))


def reproduce(seeds: int = 3) -> None:
    """Train all networks, then write the result and the figure.

    Args:
        seeds: How many runs of the two headline networks; the others have one.
    """
    configs = networks()

    def by_seed(config: Config, count: int = seeds) -> list[dict[str, Any]]:
        return [trained(changed(config, {"seed": seed})) for seed in range(count)]

    base = configs[BASELINE]
    short = shortened(base, SWEEP_STEPS)
    sweep = [
        {"learning_rate": rate} | trained(changed(short, {"learning_rate": rate}))
        for rate in RATES
    ]
    runs = {
        name: by_seed(config, seeds if name in (BASELINE, HEADLINE) else 1)
        for name, config in configs.items()
    }
    fifth = {name: shortened(configs[name], base.steps // 5) for name in FIFTH}
    short_runs = {name: by_seed(config) for name, config in fifth.items()}
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
    finish("cifar10", result, range(seeds), draw)


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


def draw(record: dict[str, Any]) -> Figure:
    """Draw Figure 2: accuracy against steps, and where Inception's best is reached."""
    table = record["result"]["table"]
    runs = {name: record["result"]["runs"][name] for name in table}
    figure, axes = new_figure(height=4.8)
    best = 100 * table[BASELINE]["best_accuracy"]
    last = runs[BASELINE][0]["steps"][-1]
    axes.plot((0, last), (best, best), color=COLORS[BASELINE], ls=":", lw=1)
    for name, each in runs.items():
        steps, row = each[0]["steps"], table[name]
        if not steps:
            continue
        accuracy = [[100 * value for value in run["test_accuracy"]] for run in each]
        median = plot_median(axes, steps, accuracy, COLORS[name], name)
        seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
        text = f"{name}: {percent(row['best_accuracy'])} %{seeds}"
        offset = (4, (name in LIFTED) - (name in LOWERED))
        mark(axes, (steps[-1], median[-1]), text, COLORS[name], offset)
    axes.set(
        title="CIFAR-10 (JPEG), Inception of an eighth of the width: median and\n"
        "range of the seeds (one where not said), labeled with the best",
        xlabel=f"training steps of {record['result']['examples_in_a_step']} examples",
        ylabel="test accuracy (%)",
        xlim=(0, 1.6 * last),
        ylim=(0, 70),
    )
    axes.set_xticks(range(0, last + 1, 2000))
    thousands(axes)
    return figure


if __name__ == "__main__":
    run_command(reproduce)
