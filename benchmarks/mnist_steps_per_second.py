"""Steps per second of the mnist preset: our layer, Flax's, and none.

    python -m benchmarks.mnist_steps_per_second

All three use the loop of train.py and differ only in the layer.
benchmarks.training_rate compares train.py with other loops. One process trains the
networks in turns, in rounds with a rotating order, so that other work on the machine
affects all of them. The rates exclude compilation. Writes
benchmarks/results/mnist_steps_per_second.json; our layer is expected to make at least
0.95 of the steps of Flax's layer. Takes about a minute, and MNIST must be prepared (see
docs/programs/training.md).
"""

import dataclasses

from benchmarks.report import run_command
from benchmarks.training_rate import compare_loops, preset, train_loop
from bnjax.data.sources import open_source
from bnjax.training.config import BatchNormConfig


def compare(rounds: int = 41, steps: int = 500, seed: int = 0) -> None:
    """Measure, print and write the three rates.

    Args:
        rounds: Of each network.
        steps: In a round, a multiple of the preset's --log-every.
        seed: Of the weights and the order of the data.
    """
    ours = preset(seed)
    flax = BatchNormConfig(implementation="flax", unbiased=False)
    configs = {
        "bnjax": ours,
        "flax": dataclasses.replace(ours, bn=flax),
        "none": dataclasses.replace(ours, batch_norm=False),
    }
    source = open_source("mnist")
    loops = {name: train_loop(source, config) for name, config in configs.items()}
    compare_loops("mnist_steps_per_second", loops, {"flax": 0.95}, rounds, steps, seed)


if __name__ == "__main__":
    run_command(compare)
