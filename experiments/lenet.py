"""LeNet of sigmoids at a learning rate of 1, with and without batch normalization.

    python -m experiments.lenet

Trains the preset `lenet-mnist` for 10 epochs with bnjax's layer, with Flax's in its
place, and without one. Writes experiments/results/lenet.json. The example of Dive into
Deep Learning, which compares a layer written from scratch with its framework's, is on
Fashion-MNIST: `--preset lenet` where that is prepared (docs/data.md).
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from experiments.runs import once, rounded, run_once

RESULTS = ROOT / "experiments" / "results"
# On Fashion-MNIST, as the book prints them.
BOOK = {
    "from scratch": {"loss": 0.250, "train_accuracy": 0.907, "test_accuracy": 0.801},
    "concise": {"loss": 0.248, "train_accuracy": 0.908, "test_accuracy": 0.869},
}


def networks(preset: str) -> dict[str, Config]:
    """Return the three networks."""
    base = PRESETS[preset].config
    flax = dataclasses.replace(base.bn, implementation="flax", unbiased=False)
    return {
        "bnjax": base,
        "flax": dataclasses.replace(base, bn=flax),
        "without": dataclasses.replace(base, batch_norm=False),
    }


def reproduce(
    preset: Literal["lenet", "lenet-mnist"] = "lenet-mnist",
    seeds: int = 3,
    data_dir: Path | None = None,
) -> None:
    """Train, then write the result.

    Args:
        preset: The network's data set.
        seeds: How many runs of each network.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    configs = networks(preset)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    # In turn, so that a busy machine is as slow for all.
    for seed in range(seeds):
        for name, config in configs.items():
            own = dataclasses.replace(config, seed=seed, data_dir=data_dir)
            measure = functools.partial(run_once, preset)
            runs[name].append(once("lenet", own, measure))
    table = {
        name: {
            "test_accuracy": [run["final_test_accuracy"] for run in each],
            "median_test_accuracy": rounded(
                float(np.median([run["final_test_accuracy"] for run in each]))
            ),
            "last_train_loss": [run["train_loss"][-1] for run in each],
            "examples_per_second": [
                round(configs[name].batch_size * run["steps_per_second"])
                for run in each
            ],
        }
        for name, each in runs.items()
    }
    command = " ".join(["python -m experiments.lenet", *sys.argv[1:]])
    result = {"table": table, "book_on_fashion_mnist": BOOK, "runs": runs}
    path = RESULTS / f"{preset.replace('-', '_')}.json"
    write_result(path, command, list(range(seeds)), result)
    print(path)


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
