"""What a run is told: typed, frozen, documented, and checked before anything starts.

tyro reads these classes for the command line; the sentence under each field is what
`--help` shows.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

from bnjax._checks import did_you_mean
from bnjax.data.config import DataConfig, validate_data
from bnjax.models import MODELS
from bnjax.training.errors import USAGE, UserError


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
    sync: str = "global"
    """Whose examples are normalized together.
    global: those of all devices.
    group:K: those of K neighbouring devices.
    per-device: those of each device by itself."""
    virtual_batch_size: int | None = None
    """Normalize so many examples at a time, in training (the paper's replicas: 32).
    None: all that --bn.sync puts together."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate over time."""

    name: Literal[
        "sgd",
        "momentum",
        "nesterov",
        "adagrad",
        "rmsprop",
        "adam",
        "adamw",
        "lamb",
        "lars",
    ] = "sgd"
    """The rule: plain SGD, SGD with (Nesterov's) momentum, or one of Optax's others."""
    momentum: float = 0.9
    """Of momentum, nesterov and lars: the weight of the old direction."""
    beta1: float = 0.9
    """Of adam, adamw and lamb: the weight of the old mean of gradients."""
    beta2: float = 0.999
    """Of adam, adamw and lamb: the weight of the old mean of squared gradients."""
    rms_decay: float = 0.9
    """Of rmsprop: the weight of the old mean of squared gradients."""
    epsilon: float = 1e-8
    """Of adagrad, rmsprop, adam, adamw and lamb: added to the denominator."""
    weight_decay: float = 0.0
    """L2 penalty on weights, never on biases or BN's scale.
    Its gradient is added to the loss's; in adamw and lamb, to the step."""
    clip_norm: float | None = None
    """Gradients of a larger global norm are scaled down to this. None: as they are."""
    schedule: Literal["constant", "exponential", "cosine", "step", "linear"] = (
        "constant"
    )
    """What the learning rate does after the warm-up.
    constant: stays as it is.
    exponential: times decay-rate every decay-steps.
    cosine: half a cosine, down to 0 at the last step.
    step: times decay-rate at each of --optim.boundaries.
    linear: a line, down to 0 at the last step."""
    decay_rate: float = 0.96
    """Of exponential and step: the factor."""
    decay_steps: int = 1000
    """Of exponential: how many steps apart."""
    staircase: bool = True
    """Of exponential: all of a decay at once; else a little of it every step."""
    boundaries: tuple[int, ...] = ()
    """Of step: the steps at which the rate drops, such as 30000 60000."""
    warmup_steps: int = 0
    """Steps over which the rate first rises on a line to --learning-rate.
    The schedule starts after them."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Several hosts that train together: the same command on each but for the index."""

    coordinator: str | None = None
    """ADDRESS:PORT of host 0, free there and reached by all. None: one host.
    auto: found by JAX, under Slurm, Open MPI and on Cloud TPU."""
    count: int = 1
    """How many hosts there are."""
    index: int = 0
    """Which of them this is, counted from 0; host 0 writes the run's folder."""
    timeout: int = 120
    """Seconds to wait for the others to come."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run is a function of this and of the machine it runs on."""

    steps: int
    """How many steps to train."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Learning rate that the schedule starts from."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do where the loss is nan or infinite.
    stop: end the run, and name the layer that it began in.
    skip: drop the step, where anything in it is not finite, and go on."""
    seed: int = 0
    """Of all randomness: first weights, order of the data, augmentation."""
    batch_norm: bool = True
    """Normalize each hidden layer; without, its bias returns."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, each normalized by itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, statistics and losses stay in float32."""
    parallel: Literal["auto", "single", "pmap", "spmd"] = "auto"
    """How devices share the work.
    pmap: each has a part of the batch.
    spmd: one program, its arrays sharded.
    single: one device works.
    auto: pmap where there are several, else single."""
    devices: int | None = None
    """How many devices to use, the first ones. None: all."""
    workdir: Path | None = None
    """Where the run writes, a folder without a run. None: runs/<preset>-<time>."""
    resume: bool = False
    """Continue the run in --workdir bit for bit; without a checkpoint, start it."""
    data_dir: Path | None = None
    """Where tfds sets are. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    log_every: int = 100
    """Steps in one dispatch to the device; metrics.jsonl has their mean."""
    eval_every: int = 500
    """Steps between two evaluations on the test set."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 2
    """How many of the newest checkpoints stay; the best by test accuracy stays too."""
    eval_batch_size: int = 1000
    """Examples in a batch of the evaluation; results stay the same."""
    tensorboard: bool = False
    """Write what metrics.jsonl has to <workdir>/tensorboard too, for TensorBoard."""
    histograms: bool = False
    """For TensorBoard: scale, bias, mean and var of BN layers, when evaluating."""
    profile: bool = False
    """Trace the second dispatch with jax.profiler, to <workdir>/profile."""
    compilation_cache: Path | None = None
    """A folder where compiled programs are kept for the next run. None: not kept."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimizerConfig = OptimizerConfig()
    bn: BatchNormConfig = BatchNormConfig()
    hosts: HostsConfig = HostsConfig()


INCIDENTAL = frozenset(
    {
        "parallel",
        "devices",
        "hosts",
        "workdir",
        "resume",
        "on_nan",
        "data_dir",
        "keep",
        "tensorboard",
        "histograms",
        "profile",
        "compilation_cache",
    }
)
"""Fields of `Config` that no result depends on: a resumed run may change them."""


def validate(config: Config) -> None:
    """Refuse values no run can use.

    Raises:
        UserError: naming the flag, what was given and what was expected.
    """
    _integers(config)
    _numbers(config)
    _optimizer(config)
    validate_data(config.data)
    if config.resume and config.workdir is None:
        raise UserError(
            "--resume needs the folder of the run to continue: add --workdir.", USAGE
        )
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
    _statistics(config)
    _hosts(config.hosts)


def _hosts(hosts: HostsConfig) -> None:
    if hosts.count < 1:
        _refuse("hosts.count", hosts.count, "1 or more")
    if not 0 <= hosts.index < hosts.count:
        _refuse(
            "hosts.index", hosts.index, f"from 0 to --hosts.count {hosts.count} - 1"
        )
    if hosts.timeout < 1:
        _refuse("hosts.timeout", hosts.timeout, "1 or more seconds")
    if hosts.coordinator is None and hosts.count > 1:
        _refuse("hosts.coordinator", None, "ADDRESS:PORT of host 0 for several hosts")
    if hosts.coordinator not in (None, "auto") and not re.fullmatch(
        r".+:\d{1,5}", hosts.coordinator or ""
    ):
        _refuse("hosts.coordinator", hosts.coordinator, 'ADDRESS:PORT, or "auto"')


def _statistics(config: Config) -> None:
    sync, virtual = config.bn.sync, config.bn.virtual_batch_size
    if not re.fullmatch(r"global|per-device|group:[1-9]\d*", sync):
        _refuse("bn.sync", sync, "global, per-device, or group:K, such as group:2")
    if virtual is not None and virtual < 2:
        _refuse("bn.virtual_batch_size", virtual, "2 or more")
    if config.devices is not None and config.devices < 1:
        _refuse("devices", config.devices, "1 or more")
    if config.batch_size % config.accumulate:
        _refuse("accumulate", config.accumulate, f"a divisor of {config.batch_size}")
    plain = sync == "global" and virtual is None and config.accumulate == 1
    if config.batch_norm and config.bn.implementation == "flax" and not plain:
        raise UserError(
            "--bn.implementation flax has the statistics of a whole batch only: leave "
            "out --bn.sync, --bn.virtual-batch-size and --accumulate.",
            USAGE,
        )


def _integers(config: Config) -> None:
    for name in (
        "steps",
        "batch_size",
        "accumulate",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "eval_batch_size",
        "keep",
    ):
        value = getattr(config, name)
        if value <= 0:
            _refuse(name, value, "a whole number of 1 or more")
    if not 0 <= config.seed < 2**32:
        _refuse("seed", config.seed, "a whole number from 0 to 2**32 - 1")
    if not config.model.hidden or min(config.model.hidden) <= 0:
        _refuse("model.hidden", config.model.hidden, "one or more positive widths")


def _numbers(config: Config) -> None:
    positive = {
        "learning_rate": config.learning_rate,
        "bn.epsilon": config.bn.epsilon,
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


def _optimizer(config: Config) -> None:
    optim = config.optim
    for name in ("momentum", "beta1", "beta2", "rms_decay"):
        value = getattr(optim, name)
        if not 0 <= value < 1:
            _refuse(f"optim.{name}", value, "a number in [0, 1)")
    for name in ("epsilon", "decay_rate", "clip_norm"):
        value = getattr(optim, name)
        if value is not None and not 0 < value < math.inf:
            _refuse(f"optim.{name}", value, "a positive number")
    if not 0 <= optim.weight_decay < math.inf:
        _refuse("optim.weight_decay", optim.weight_decay, "a number of 0 or more")
    if optim.decay_steps <= 0:
        _refuse("optim.decay_steps", optim.decay_steps, "1 or more")
    if not 0 <= optim.warmup_steps < config.steps:
        expected = f"0 or more, and fewer than the {config.steps} --steps"
        _refuse("optim.warmup_steps", optim.warmup_steps, expected)
    rising = sorted({step for step in optim.boundaries if step > 0})
    if list(optim.boundaries) != rising or (optim.schedule == "step") != bool(rising):
        expected = "rising steps with --optim.schedule step, none with another"
        _refuse("optim.boundaries", optim.boundaries, expected)


def _refuse(field: str, value: object, expected: str, hint: str = "") -> None:
    flag = "--" + field.replace("_", "-")
    raise UserError(f"{flag} {value}: expected {expected}.{hint}", USAGE)
