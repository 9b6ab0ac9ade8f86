"""Steps per second of the mnist preset: our layer, Flax's, and none.

    python -m benchmarks.mnist_steps_per_second

One process trains the three networks in turn, round after round, the order rotating,
so that whatever else the machine does falls on all of them. Compiling is left out. The
result is benchmarks/results/mnist_steps_per_second.json; ours is asked to make at
least 0.95 of the steps that Flax's makes. It takes about a minute and needs MNIST
prepared (see docs/training.md).
"""

import dataclasses
import statistics
import sys
from pathlib import Path

import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.data.sources import open_source
from bnjax.training.config import BatchNormConfig, Config
from bnjax.training.loop import Run
from bnjax.training.presets import PRESETS

RESULT = ROOT / "benchmarks" / "results" / "mnist_steps_per_second.json"


def configurations(seed: int) -> dict[str, Config]:
    preset = dataclasses.replace(PRESETS["mnist"].config, seed=seed)
    flax = BatchNormConfig(implementation="flax", unbiased=False)
    return {
        "bnjax": preset,
        "flax": dataclasses.replace(preset, bn=flax),
        "none": dataclasses.replace(preset, batch_norm=False),
    }


def measure(run: Run, steps: int) -> float:
    """Take some steps as the training loop takes them; return steps per second."""
    before = run.seconds
    for _ in range(steps // run.config.log_every):
        run.dispatch(run.config.log_every)
    return steps / (run.seconds - before)


def compare(
    rounds: int = 41, steps: int = 500, seed: int = 0, data_dir: Path | None = None
) -> None:
    """Measure, print and write the three rates.

    Args:
        rounds: Of each network.
        steps: In a round, a multiple of the preset's --log-every.
        seed: Of the weights and the order of the data.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    configs = configurations(seed)
    source = open_source("mnist", data_dir)
    runs = {name: Run(config, source) for name, config in configs.items()}
    for run in runs.values():
        measure(run, steps)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            rates[name].append(measure(runs[name], steps))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [
        ours / theirs
        for ours, theirs in zip(rates["bnjax"], rates["flax"], strict=True)
    ]
    result = {
        "steps_per_second_median": medians,
        "bnjax_over_flax": {
            "median_of_rounds": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "of_medians": medians["bnjax"] / medians["flax"],
        },
        "rounds": rounds,
        "steps_per_round": steps,
        "steps_per_second": rates,
    }
    for name, median in medians.items():
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        print(f"{name:6} {median:8,.0f} steps/s (median of {rounds}; {spread})")
    print(f"bnjax / flax: {statistics.median(ratios):.3f} (median of the rounds')")
    command = " ".join(["python -m benchmarks.mnist_steps_per_second", *sys.argv[1:]])
    write_result(RESULT, command, [seed], result)
    print(RESULT)


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(compare)))
