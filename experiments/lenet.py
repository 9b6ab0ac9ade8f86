"""LeNet of sigmoids at a learning rate of 1, with and without batch normalization.

    python -m experiments.lenet

Trains the preset `lenet-mnist` for 10 epochs with bnjax's layer, with Flax's layer, and
without batch normalization. Writes experiments/results/lenet.json. The example of Dive
into Deep Learning, which compares a layer written from scratch with its framework's
layer, uses Fashion-MNIST: give `--preset lenet` if that set is prepared
(docs/programs/data.md).
"""

import functools
from typing import Any, Literal

from benchmarks.report import run_command
from bnjax.training.config import Config
from experiments.runs import changed, finish, median, once, run_once
from experiments.runs import preset as preset_of

# On Fashion-MNIST, as the book prints them.
BOOK = {
    "from scratch": {"loss": 0.250, "train_accuracy": 0.907, "test_accuracy": 0.801},
    "concise": {"loss": 0.248, "train_accuracy": 0.908, "test_accuracy": 0.869},
}


def networks(name: str) -> dict[str, Config]:
    """Return the three networks of a preset."""
    flax = {"bn.implementation": "flax", "bn.unbiased": False}
    changes = {"bnjax": {}, "flax": flax, "without": {"batch_norm": False}}
    return {network: preset_of(name, each) for network, each in changes.items()}


def reproduce(
    preset: Literal["lenet", "lenet-mnist"] = "lenet-mnist",
    seeds: int = 3,
) -> None:
    """Train, then write the result.

    Args:
        preset: The network's data set.
        seeds: How many runs of each network.
    """
    configs = networks(preset)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    # In turn, so that a busy machine is as slow for all.
    for seed in range(seeds):
        for name, config in configs.items():
            own = changed(config, {"seed": seed})
            measure = functools.partial(run_once, preset)
            runs[name].append(once("lenet", own, measure))
    table = {
        name: {
            "test_accuracy": [run["final_test_accuracy"] for run in each],
            "median_test_accuracy": median(
                [run["final_test_accuracy"] for run in each]
            ),
            "last_train_loss": [run["train_loss"][-1] for run in each],
            "examples_per_second": [
                round(configs[name].batch_size * run["steps_per_second"])
                for run in each
            ],
        }
        for name, each in runs.items()
    }
    result = {"table": table, "book_on_fashion_mnist": BOOK, "runs": runs}
    finish(preset.replace("-", "_"), result, range(seeds), module="lenet")


if __name__ == "__main__":
    run_command(reproduce)
