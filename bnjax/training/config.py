"""What a run is told: typed, frozen, documented.

tyro reads these classes for the command line; the sentence under each field is what
`--help` shows. `bnjax.training.config` refuses what no run can use.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bnjax import models
from bnjax._validate import ACTIVATIONS, did_you_mean
from bnjax.data.config import INCIDENTAL as DATA_INCIDENTAL
from bnjax.data.config import DataConfig, SettingError, validate_data
from bnjax.models import MODELS


class RunError(ValueError):
    """A run that cannot be started, read or gone on with."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. An option of None has the model's own default."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "mlp"
    """mlp, lenet, inception, resnet20, resnet56, resnet110 or resnet50.
    my_package.nets:make_net: a function of your own."""
    hidden: tuple[int, ...] | None = None
    """Of mlp: width of each hidden layer."""
    weight_std: float | None = None
    """Of mlp: standard deviation of the Gaussian the weights start from."""
    weight_scale: float | None = None
    """Of the others: factor on the standard deviation of the first weights."""
    activation: str | None = None
    """The nonlinearity, a name of jax.nn such as "relu" or "sigmoid"."""
    dropout: float | None = None
    """Of inception and resnet: rate of dropout before the classifier."""
    pool: Literal["avg", "max"] | None = None
    """Of lenet: how it pools."""
    width: float | None = None
    """Of inception and resnet: factor on the number of filters of each layer."""
    stem: Literal["imagenet", "small"] | None = None
    """Of inception: its first layers, for images of 224x224, or for 32x32."""
    separable_conv1: bool | None = None
    """Of inception: conv1 separable, with depth multiplier 8 (the paper's appendix)."""
    printed_depths: bool | None = None
    """Of inception: depths as the paper prints them, not as its filters sum up."""
    local_response_norm: bool | None = None
    """Of inception: normalize the local response after pool1 and after conv2."""
    per_activation: bool | None = None
    """Of inception: BN of the last modules scales and shifts each position apart."""
    zero_scale: bool | None = None
    """Of resnet: the scale of each block's last BN starts at 0, not at 1."""


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
    seed: int = 0
    """Of all randomness: first weights, order of the data, augmentation."""
    batch_norm: bool = True
    """Normalize each hidden layer; without, its bias returns."""
    ema: float | None = None
    """Evaluate a moving average of the parameters; this is the old average's weight.
    None: evaluate the parameters themselves."""
    batch_stats_from: int = 100
    """Of --ema: over how many training batches the average's statistics are taken."""
    init_from: Path | None = None
    """Start from another network: the folder of a run, or weights saved by PyTorch.
    Its last layer starts anew where the classes are others."""
    init_stats: Literal["adapt", "freeze", "reset"] = "adapt"
    """What becomes of the running statistics of --init-from.
    adapt: they move on from where they are.
    freeze: they stay, and normalize in training too.
    reset: they start anew."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, each normalized by itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, statistics and losses stay in float32."""
    parallel: Literal["auto", "single", "pmap", "spmd"] = "auto"
    """How devices share the work.
    pmap: each has a part of the batch.
    spmd: one program, its arrays sharded.
    single: one device works.
    auto: pmap where there are several, else single.
    A network of your own that takes no normalization: spmd in place of pmap."""
    devices: int | None = None
    """How many devices to use, the first ones. None: all."""
    workdir: Path | None = None
    """Where the run writes, a folder without a run. None: runs/<preset>-<time>."""
    resume: bool = False
    """Continue the run in --workdir bit for bit; without a checkpoint, start it."""
    data_dir: Path | None = None
    """Where tfds sets are. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    log_every: int = 100
    """Steps that metrics.jsonl has the mean of, in one dispatch to the device.
    Convolutions on a CPU are dispatched step by step: in a loop they are slow."""
    eval_every: int = 500
    """Steps between two evaluations on the test set."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 2
    """How many of the newest checkpoints stay; the best by test accuracy stays too."""
    eval_batch_size: int = 1000
    """Examples in a batch of the evaluation; results stay the same."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do where the loss is nan or infinite.
    stop: end the run, and name the layer that it began in.
    skip: drop the step, where anything in it is not finite, and go on."""
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


def is_import_path(name: str) -> bool:
    """Say whether a model's name is a function of the user's own.

    Example:
        >>> is_import_path("my_package.nets:make_net"), is_import_path("mlp")
        (True, False)
    """
    return ":" in name


OPTIONS = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name != "name"
)


def set_options(model: ModelConfig) -> dict[str, Any]:
    """Return the options that are set.

    Example:
        >>> set_options(ModelConfig(name="lenet", pool="max"))
        {'pool': 'max'}
    """
    values = {name: getattr(model, name) for name in OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def refuse_options(model: ModelConfig, known: Collection[str]) -> None:
    """Refuse an option that the model does not have.

    Args:
        model: what is asked for.
        known: the names of the options it has.

    Raises:
        RunError: naming the option, and those that there are.

    Example:
        >>> refuse_options(ModelConfig(name="lenet", width=0.5), ("pool",))
        Traceback (most recent call last):
        bnjax.training.config.RunError: --model.width 0.5: lenet has no such option;
        it has --model.pool.
    """
    for name, value in set_options(model).items():
        if name in known:
            continue
        has = [f"--model.{each.replace('_', '-')}" for each in OPTIONS if each in known]
        raise SettingError(
            f"--model.{name.replace('_', '-')} {value}: {model.name} has no such "
            f"option; it has {', '.join(has) or 'none'}.{did_you_mean(name, known)}",
        )


def to_json(config: Any) -> Any:
    """Return a configuration as JSON holds it.

    Example:
        >>> from bnjax.training.presets import digits
        >>> to_json(digits())["bn"]["momentum"]
        0.9
        >>> from_json(to_json(digits()), "config.json") == digits()
        True
    """
    if dataclasses.is_dataclass(config):
        fields = dataclasses.fields(config)
        return {field.name: to_json(getattr(config, field.name)) for field in fields}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def from_json(value: Any, where: str) -> Config:
    """Read a configuration back, exactly as it was.

    Args:
        value: what `to_json` gave.
        where: the file, for messages.

    Raises:
        RunError: a field is missing, unknown or of another type, or its value is one
            that no run can use.
    """
    try:
        config = _read(Config, value, "")
        validate(config)
    except (TypeError, ValueError, RunError) as error:
        raise RunError(
            f"{where} is damaged or from another version of bnjax: {error} "
            "Restore the file, or train again."
        ) from error
    return config


def result_config(config: Config) -> dict[str, Any]:
    """Return the part of the configuration that results depend on, as JSON."""
    value = to_json(config)
    data = value["data"]
    value["data"] = {n: data[n] for n in data if n not in DATA_INCIDENTAL}
    return {name: value[name] for name in value if name not in INCIDENTAL}


def differences(recorded: Config, given: Config) -> list[str]:
    """Name each flag by which two runs would have different results.

    Example:
        >>> from bnjax.training.presets import digits
        >>> import dataclasses
        >>> differences(digits(), dataclasses.replace(digits(), seed=1, keep=9))
        ['--seed: the run has 0, 1 was given']
    """
    before, now = (_flatten(result_config(config)) for config in (recorded, given))
    return [
        f"--{name.replace('_', '-')}: the run has {before[name]}, {now[name]} was given"
        for name in before
        if before[name] != now[name]
    ]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, item in value.items():
        path = f"{prefix}{name}"
        flat |= _flatten(item, f"{path}.") if isinstance(item, dict) else {path: item}
    return flat


def _read(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`, or raise naming the place."""
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, path)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and value in choices:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(choices[0], item, path) for item in value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(choices[0], value, path)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError(f"{path} is {value!r}; expected {kind}.")


def _read_fields(kind: Any, value: Any, path: str) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        given = sorted(value) if isinstance(value, dict) else value
        raise ValueError(
            f"{path or 'the configuration'} has {given}; expected {sorted(names)}."
        )
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            name: _read(hints[name], value[name], f"{path}.{name}".lstrip("."))
            for name in names
        }
    )


def validate(config: Config) -> None:
    """Refuse values no run can use.

    Raises:
        RunError: naming the flag, what was given and what was expected.
    """
    _integers(config)
    _numbers(config)
    _optimizer(config)
    validate_data(config.data)
    if config.resume and config.workdir is None:
        raise SettingError(
            "--resume needs the folder of the run to continue: add --workdir."
        )
    _model(config.model)
    if config.batch_norm and config.batch_size < 2:
        raise SettingError(
            "--batch-size 1: batch normalization in training needs at least 2 examples "
            "to take statistics over. Give a larger batch, or --no-batch-norm.",
        )
    if config.batch_norm and config.bn.implementation == "flax" and config.bn.unbiased:
        raise SettingError(
            "--bn.implementation flax keeps the biased variance only: "
            "add --bn.no-unbiased.",
        )
    if config.init_stats != "adapt" and config.init_from is None:
        raise SettingError(
            f"--init-stats {config.init_stats}: there are no statistics to start from; "
            "add --init-from.",
        )
    _statistics(config)
    _hosts(config.hosts)


def _model(model: ModelConfig) -> None:
    if not is_import_path(model.name):
        if model.name not in MODELS:
            expected = (
                f"one of {', '.join(MODELS)}, or a function of your own, such as "
                "my_package.nets:make_net"
            )
            hint = did_you_mean(model.name, MODELS)
            _refuse("model.name", model.name, expected, hint)
        refuse_options(model, models.options(model.name))
    if model.hidden is not None and min(model.hidden, default=0) <= 0:
        _refuse("model.hidden", model.hidden, "one or more positive widths")
    for name in ("weight_scale", "width"):
        value = getattr(model, name)
        if value is not None and not 0 < value < math.inf:
            _refuse(f"model.{name}", value, "a positive number")
    if model.weight_std is not None and not 0 <= model.weight_std < math.inf:
        _refuse("model.weight_std", model.weight_std, "a number of 0 or more")
    if model.dropout is not None and not 0 <= model.dropout < 1:
        _refuse("model.dropout", model.dropout, "a rate in [0, 1)")
    if model.activation is not None and model.activation not in ACTIVATIONS:
        hint = did_you_mean(model.activation, ACTIVATIONS)
        expected = f"one of {', '.join(ACTIVATIONS)}"
        _refuse("model.activation", model.activation, expected, hint)


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
        raise SettingError(
            "--bn.implementation flax has the statistics of a whole batch only: leave "
            "out --bn.sync, --bn.virtual-batch-size and --accumulate.",
        )


def _integers(config: Config) -> None:
    for name in (
        "steps",
        "batch_size",
        "accumulate",
        "batch_stats_from",
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


def _numbers(config: Config) -> None:
    positive = {
        "learning_rate": config.learning_rate,
        "bn.epsilon": config.bn.epsilon,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            _refuse(name, value, "a positive number")
    if config.ema is not None and not 0 <= config.ema < 1:
        expected = "a number in [0, 1), the weight of the old average"
        _refuse("ema", config.ema, expected)
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
    raise SettingError(f"{flag} {value}: expected {expected}.{hint}")
