"""What a run is told: typed, frozen, documented, and checked before anything starts.

tyro reads these classes for the command line; the sentence under each field is what
`--help` shows.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from bnjax.models import MODELS
from bnjax.training.errors import USAGE, UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    name: str = "digits"
    """The embedded "digits", or a prepared tfds set: "mnist", "mnist:3.0.1"."""
    binarize: bool = False
    """Pixels above half of their range become 1, others 0; else scaled to [0, 1]."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "mlp"
    """A model by its name: "mlp"."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Width of each hidden layer."""
    weight_std: float = 0.01
    """Standard deviation of the Gaussian the weights start from."""


@dataclasses.dataclass(frozen=True)
class BatchNormConfig:
    """Batch normalization."""

    momentum: float = 0.99
    """Weight of the OLD running value, as in Flax (PyTorch's 0.1 is 0.9 here)."""
    epsilon: float = 1e-5
    """Added to the variance."""
    unbiased: bool = True
    """Running variance with Algorithm 2's m/(m-1), as PyTorch; Flax: without."""
    implementation: Literal["bnjax", "flax"] = "bnjax"
    """Whose layer: bnjax.linen.BatchNorm, or to compare, flax.linen.BatchNorm."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate over time."""

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    """Plain SGD, SGD with momentum, or Adam."""
    momentum: float = 0.9
    """Of "momentum": the weight of the old direction."""
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """Constant, times decay-rate every decay-steps, or half a cosine down to 0."""
    decay_rate: float = 0.96
    """Of "exponential": the factor."""
    decay_steps: int = 1000
    """Of "exponential": how many steps apart."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run is a function of this and of the machine it runs on."""

    steps: int
    """How many steps to train."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Where the schedule starts."""
    seed: int = 0
    """All randomness follows from it: first weights and the order of the data."""
    batch_norm: bool = True
    """Normalize each hidden layer; else the same network with its biases back."""
    workdir: Path | None = None
    """Where the run writes, a folder without a run. None: runs/<preset>-<time>."""
    data_dir: Path | None = None
    """Where tfds sets are. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    log_every: int = 100
    """Steps in one dispatch to the device; metrics.jsonl has their mean."""
    eval_every: int = 500
    """Steps between two evaluations on the test set."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; the last step always makes one."""
    eval_batch_size: int = 1000
    """Examples in a batch of the evaluation; results stay the same."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimizerConfig = OptimizerConfig()
    bn: BatchNormConfig = BatchNormConfig()


def validate(config: Config) -> None:
    """Refuse values no run can use.

    Raises:
        UserError: naming the flag, what was given and what was expected.
    """
    _integers(config)
    _numbers(config)
    if config.model.name not in MODELS:
        hint = did_you_mean(config.model.name, MODELS)
        _refuse("model.name", config.model.name, f"one of {', '.join(MODELS)}", hint)
    if config.batch_norm and config.batch_size < 2:
        raise UserError(
            "--batch-size 1: batch normalization in training needs at least 2 examples "
            "to take statistics over. Give a larger batch, or --no-batch-norm.",
            USAGE,
        )
    if config.batch_norm and config.bn.implementation == "flax" and config.bn.unbiased:
        raise UserError(
            "--bn.implementation flax keeps the biased variance only: "
            "add --bn.no-unbiased.",
            USAGE,
        )


def _integers(config: Config) -> None:
    for name in (
        "steps",
        "batch_size",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "eval_batch_size",
    ):
        value = getattr(config, name)
        if value <= 0:
            _refuse(name, value, "a whole number of 1 or more")
    if not 0 <= config.seed < 2**32:
        _refuse("seed", config.seed, "a whole number from 0 to 2**32 - 1")
    if not config.model.hidden or min(config.model.hidden) <= 0:
        _refuse("model.hidden", config.model.hidden, "one or more positive widths")
    if config.optim.decay_steps <= 0:
        _refuse("optim.decay_steps", config.optim.decay_steps, "1 or more")


def _numbers(config: Config) -> None:
    positive = {
        "learning_rate": config.learning_rate,
        "bn.epsilon": config.bn.epsilon,
        "optim.decay_rate": config.optim.decay_rate,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            _refuse(name, value, "a positive number")
    if not 0 <= config.model.weight_std < math.inf:
        _refuse("model.weight_std", config.model.weight_std, "a number of 0 or more")
    if not 0 <= config.bn.momentum <= 1:
        expected = (
            "a number in [0, 1], the weight of the old value (PyTorch's 0.1 is 0.9 "
            "here)"
        )
        _refuse("bn.momentum", config.bn.momentum, expected)
    if not 0 <= config.optim.momentum < 1:
        _refuse("optim.momentum", config.optim.momentum, "a number in [0, 1)")


def _refuse(field: str, value: object, expected: str, hint: str = "") -> None:
    flag = "--" + field.replace("_", "-")
    raise UserError(f"{flag} {value}: expected {expected}.{hint}", USAGE)
