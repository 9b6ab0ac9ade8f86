"""Section 4.1 of the paper: test accuracy on MNIST with and without normalization.

    python -m experiments.mnist --seeds 3

Trains the `mnist` preset with batch normalization and without, once for each seed, and
writes experiments/results/mnist.json and docs/figures/mnist.png. Three seeds take about
two minutes on two CPU cores. MNIST has to be prepared (docs/training.md).
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.report import ROOT, write_result
from bnjax.training.errors import run_reporting
from bnjax.training.loop import train
from bnjax.training.presets import mnist

RESULT = ROOT / "experiments" / "results" / "mnist.json"
FIGURE = ROOT / "docs" / "figures" / "mnist.png"
NETWORKS = {"with batch normalization": True, "without": False}


def run_once(*, batch_norm: bool, seed: int, data_dir: Path | None) -> dict[str, Any]:
    """Train one network; return its test accuracies and its summary."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        config = dataclasses.replace(
            mnist(),
            batch_norm=batch_norm,
            seed=seed,
            workdir=workdir,
            data_dir=data_dir,
        )
        summary = train("mnist", config)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    tests = [record for record in map(json.loads, lines) if record["split"] == "test"]
    return {
        "steps": [record["step"] for record in tests],
        "test_accuracy": [record["accuracy"] for record in tests],
        "final_test_accuracy": summary["test_accuracy"],
        "state_sha256": summary["state_sha256"],
        "seed": seed,
    }


def draw(networks: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the median over seeds, and the range as a band."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), color in zip(networks.items(), ("C0", "C3"), strict=True):
        steps = np.asarray(runs[0]["steps"]) / 1000
        accuracy = 100 * np.asarray([run["test_accuracy"] for run in runs])
        median = np.median(accuracy, axis=0)
        axes.plot(steps, median, color=color, label=name)
        axes.fill_between(
            steps, accuracy.min(0), accuracy.max(0), color=color, alpha=0.2, lw=0
        )
        axes.annotate(
            f"{median[-1]:.1f} %",
            (steps[-1], median[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set(
        title="MNIST, three hidden layers of 100 sigmoids",
        xlabel="training steps of 60 examples (thousands)",
        ylabel="test accuracy (%)",
        xlim=(0, steps[-1] * 1.1),
        ylim=(80, 100),
    )
    seeds = len(next(iter(networks.values())))
    axes.legend(loc="lower right", title=f"median and range of {seeds} seeds")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def compare(seeds: int = 3, data_dir: Path | None = None) -> None:
    """Train both networks, then write the result and the figure.

    Args:
        seeds: How many runs of each network.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    networks = {
        name: [
            run_once(batch_norm=batch_norm, seed=seed, data_dir=data_dir)
            for seed in range(seeds)
        ]
        for name, batch_norm in NETWORKS.items()
    }
    command = " ".join(["python -m experiments.mnist", *sys.argv[1:]])
    write_result(RESULT, command, list(range(seeds)), networks)
    draw(networks, FIGURE)
    print(f"{RESULT}\n{FIGURE}")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(compare)))
