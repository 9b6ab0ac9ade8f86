"""Steps per second of the mnist preset: our layer, Flax's, and none.

    python -m benchmarks.mnist_steps_per_second

All three are train.py's own loop: they differ in the layer alone. What train.py gains
over another loop is in benchmarks.training_rate. One process trains the networks in
turn, round after round, the order rotating, so that whatever else the machine does
falls on all of them. Compiling is left out. The result is
benchmarks/results/mnist_steps_per_second.json; ours is asked to make at least 0.95 of
the steps that Flax's makes. It takes about a minute and needs MNIST prepared (see
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
