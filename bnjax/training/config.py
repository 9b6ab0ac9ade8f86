"""The configuration of a run: typed, frozen and documented.

tyro reads these classes for the command line; the text under each field appears in
`--help`. `validate` refuses values that no run can use.
"""

import ast
import contextlib
import dataclasses
import json
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

import bnjax
from bnjax import models
from bnjax._validate import ACTIVATIONS, did_you_mean
from bnjax.data.config import INCIDENTAL as DATA_INCIDENTAL
from bnjax.data.config import DataConfig, SettingError, validate_data
from bnjax.models import MODELS


class RunError(ValueError):
    """A run cannot be started, read or continued."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. None keeps the model's own default."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "mlp"
    """mlp, lenet, inception, or resnet followed by 18, 20, 34, 50, 56, 101, 110 or 152.
    my_package.nets:make_net: a function of your own."""
    hidden: tuple[int, ...] | None = None
    """For mlp: the width of each hidden layer."""
    weight_std: float | None = None
    """For mlp: the standard deviation of the Gaussian initial weights."""
    weight_scale: float | None = None
    """For the other models: a factor on the standard deviation of initial weights."""
    activation: str | None = None
    """The nonlinearity, a function of jax.nn such as "relu" or "sigmoid"."""
    dropout: float | None = None
    """For inception and resnet: the dropout rate before the classifier."""
    pool: Literal["avg", "max"] | None = None
    """For lenet: the kind of pooling."""
    width: float | None = None
    """For inception and resnet: a factor on the number of filters of each layer."""
    stem: Literal["imagenet", "small"] | None = None
    """For inception: the first layers, for images of 224x224 or of 32x32."""
    separable_conv1: bool | None = None
    """For inception: separable conv1, depth multiplier 8 (the paper's appendix)."""
    printed_depths: bool | None = None
    """For inception: use the paper's printed depths, not the sums of its filters."""
    local_response_norm: bool | None = None
    """For inception: add local response normalization after pool1 and conv2."""
    per_activation: bool | None = None
    """For inception: the last modules' BN scales and shifts each position by itself."""
    zero_scale: bool | None = None
    """For resnet: start the scale of each block's last BN at 0, not at 1."""


@dataclasses.dataclass(frozen=True)
class BatchNormConfig:
    """Batch normalization."""

    momentum: float = 0.99
    """Weight of the OLD running value, as in Flax (PyTorch's 0.1 is 0.9 here)."""
    epsilon: float = 1e-5
    """The number added to the variance."""
    unbiased: bool = True
    """Keep the running variance with the factor m/(m-1) of Algorithm 2.
    PyTorch has this factor, Flax does not."""
    implementation: Literal["bnjax", "flax"] = "bnjax"
    """The layer: bnjax.linen.BatchNorm or, for comparisons, flax.linen.BatchNorm."""
    sync: str = "global"
    """Which examples are normalized together.
    global: the examples of all devices.
    group:K: the examples of K neighboring devices.
    per-device: the examples of each device by itself."""
    virtual_batch_size: int | None = None
    """Normalize this many examples at a time in training (the paper's replicas: 32).
    None: all examples that --bn.sync normalizes together."""


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Return keywords from NAME=VALUE words; a value is a Python literal or a string.

    Examples:
        >>> read_options(["b1=0.9", "nesterov=True", "accumulator_dtype=bfloat16"])
        {'b1': 0.9, 'nesterov': True, 'accumulator_dtype': 'bfloat16'}
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"{word!r} given; expected NAME=VALUE, such as b1=0.9.")
        options[name] = value
        with contextlib.suppress(SyntaxError, ValueError):
            options[name] = ast.literal_eval(value)
    return options


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=read_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda options: [f"{k}={v}" for k, v in options.items()],
    ),
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate schedule."""

    name: str = "sgd"
    """The Optax name of the optimizer: sgd, adam, adamw, lion, lars, ..."""
    options: Options = dataclasses.field(default_factory=dict)
    """Keywords of the optimizer, such as momentum=0.9 nesterov=True.
    Other keywords keep the preset's values."""
    weight_decay: float = 0.0
    """L2 penalty on weights, never on biases or BN's scale.
    An optimizer with its own weight_decay, such as adamw, gets this value instead."""
    clip_norm: float | None = None
    """Clip gradients to this global norm. None: do not clip."""
    schedule: str = "constant_schedule"
    """The Optax name of the learning rate schedule after the warm-up.
    constant_schedule, cosine_decay_schedule, exponential_decay, ..."""
    schedule_options: Options = dataclasses.field(default_factory=dict)
    """Keywords of the schedule, such as decay_rate=0.96 transition_steps=1000.
    Omitted required keywords: from --learning-rate to 0, in the remaining steps."""
    warmup_steps: int = 0
    """Steps of a linear warm-up to --learning-rate.
    The schedule starts after the warm-up."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Several hosts that train together, with the same command except the index."""

    coordinator: str | None = None
    """ADDRESS:PORT of host 0, a free port that all hosts can reach. None: one host.
    auto: JAX finds it, under Slurm, Open MPI and on Cloud TPU."""
    count: int = 1
    """The number of hosts."""
    index: int = 0
    """The index of this host, from 0; host 0 writes the run's folder."""
    timeout: int = 120
    """Seconds to wait for the other hosts."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run, which together with the machine determine its results."""

    steps: int
    """The number of training steps."""
    batch_size: int
    """The number of examples in a step."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])]
    """The learning rate at the start of the schedule."""
    seed: int = 0
    """The seed of all randomness: initial weights, order of the data, augmentation."""
    batch_norm: bool = True
    """Normalize each hidden layer. Without normalization, the layers have biases."""
    ema: float | None = None
    """Evaluate a moving average of the parameters, with this weight of the old value.
    None: evaluate the parameters themselves."""
    batch_stats_from: int = 100
    """For --ema: the number of training batches for the average's statistics."""
    init_from: Path | None = None
    """Start from another network: the folder of a run, or weights from PyTorch.
    The last layer is new if the classes differ."""
    init_stats: Literal["adapt", "freeze", "reset"] = "adapt"
    """How to use the running statistics of --init-from.
    adapt: start from them and update them.
    freeze: keep them, and normalize by them in training too.
    reset: start with new statistics."""
    accumulate: int = 1
    """The number of micro-batches in a batch, each normalized by itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations; parameters, statistics and losses stay float32."""
    parallel: Literal["auto", "single", "pmap", "spmd"] = "auto"
    """How devices share the work.
    pmap: each device has a part of the batch.
    spmd: one program with sharded arrays.
    single: use one device.
    auto: pmap if there are several devices, else single.
    A network of your own that takes no normalization: spmd instead of pmap."""
    devices: int | None = None
    """Use only the first devices, this many. None: all devices."""
    workdir: Path | None = None
    """The folder to write, without a run in it. None: runs/<preset>-<time>."""
    resume: bool = False
    """Continue the run in --workdir bit for bit; without a checkpoint, start it."""
    data_dir: Path | None = None
    """The folder of tfds sets. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    log_every: int = 100
    """Steps in one dispatch to the device; metrics.jsonl has their mean.
    Convolutions on a CPU are dispatched step by step, because a loop is slow there."""
    eval_every: int = 500
    """Steps between two evaluations on the test set."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; the last step always writes one."""
    keep: int = 2
    """The number of newest checkpoints to keep, beside the best by test accuracy."""
    eval_batch_size: int = 1000
    """The number of examples in an evaluation batch; it does not change results."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do if the loss is nan or infinite.
    stop: end the run, and name the layer where it began.
    skip: drop every step with a value that is not finite, and continue."""
    tensorboard: bool = False
    """Also write the contents of metrics.jsonl to <workdir>/tensorboard."""
    histograms: bool = False
    """For TensorBoard: write scale, bias, mean and var of BN layers at evaluations."""
    record_inputs: bool = False
    """At evaluations, write percentiles of nonlinearity inputs to layers.jsonl.
    Figure 1b, c of the paper shows such percentiles."""
    profile: bool = False
    """Trace the second dispatch with jax.profiler, to <workdir>/profile."""
    compilation_cache: Path | None = None
    """A folder to keep compiled programs for the next run. None: do not keep them."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    bn: BatchNormConfig = BatchNormConfig()
    hosts: HostsConfig = HostsConfig()


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named configuration, with the expected accuracy and, if known, the time."""

    name: str
    summary: str
    expectation: str
    config: Config
    time: str = ""


def vary(config: Any, **changes: Any) -> Any:
    """Return a configuration with changed fields; a dict changes fields of a group.

    Examples:
        >>> vary(Config(9, 8, 0.1), seed=1, bn={"sync": "group:2"}).bn.sync
        'group:2'
    """
    for name, change in changes.items():
        if dataclasses.is_dataclass(getattr(config, name)):
            changes[name] = vary(getattr(config, name), **change)
    return dataclasses.replace(config, **changes)


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
        "record_inputs",
        "profile",
        "compilation_cache",
    }
)
"""Fields of `Config` that do not affect results; a resumed run may change them."""
OPTIONS = tuple(field.name for field in dataclasses.fields(ModelConfig)[1:])


def is_import_path(name: str) -> bool:
    """Return whether a model's name refers to a function of the user."""
    return ":" in name


def as_flag(field: str) -> str:
    """Return the flag of a field, such as "bn.sync"."""
    return f"--{field.replace('_', '-')}"


def set_options(model: ModelConfig) -> dict[str, Any]:
    """Return the options that are not None."""
    values = {name: getattr(model, name) for name in OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def refuse_options(model: ModelConfig, known: Collection[str]) -> None:
    """Refuse an option that is not among the `known` options of the model."""
    for name, value in set_options(model).items():
        if name not in known:
            has = [as_flag(f"model.{each}") for each in OPTIONS if each in known]
            raise SettingError(
                f"{as_flag(f'model.{name}')} {value}: {model.name} has no such option; "
                f"it has {', '.join(has) or 'none'}.{did_you_mean(name, known)}",
            )


def to_json(config: Any) -> Any:
    """Return a configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def from_json(value: Any, where: str, made_by: str | None = None) -> Config:
    """Return the configuration of a result of `to_json`, if a run can use it.

    Args:
        value: the result of `to_json`.
        where: the file, for messages.
        made_by: the version of bnjax that wrote it, if it is known.

    Returns:
        The configuration.

    Raises:
        RunError: if the value is damaged or from another version.
    """
    try:
        config = _read(Config, value, "")
        validate(config)
    except (TypeError, ValueError) as error:
        problem, advice = "is damaged", "Restore the file"
        if made_by not in (None, bnjax.__version__):
            problem = f"was made by bnjax {made_by}; this is {bnjax.__version__}"
            advice = "Use that version"
        raise RunError(f"{where} {problem}: {error} {advice}, or train again.") from (
            error
        )
    return config


def result_config(config: Config) -> dict[str, Any]:
    """Return the settings that affect the state after a step, as JSON.

    `steps` is left out, because a resumed run may have more steps.
    """
    value = to_json(config)
    value["data"] = {n: v for n, v in value["data"].items() if n not in DATA_INCIDENTAL}
    return {n: v for n, v in value.items() if n not in {*INCIDENTAL, "steps"}}


def differences(recorded: Config, given: Config) -> list[str]:
    """Describe each flag that prevents resuming the run."""
    before, now = flag_values(recorded), flag_values(given)
    incidental = {*INCIDENTAL, *(f"data.{name}" for name in DATA_INCIDENTAL)}
    if given.steps > recorded.steps:
        incidental.add("steps")
    return [
        f"{as_flag(name)}: the run has {before[name]}, {now[name]} was given"
        for name in before
        if before[name] != now[name]
        and incidental.isdisjoint({name, name.partition(".")[0]})
    ]


def flag_values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the value of each field by its name, such as "bn.momentum"."""
    values = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        values |= flag_values(value, f"{name}.") if nested else {name: value}
    return values


def _read(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`, or raise an error that names the field."""
    if dataclasses.is_dataclass(kind):
        names = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            given = sorted(value) if isinstance(value, dict) else value
            raise ValueError(
                f"{path or 'the configuration'} has {given}; expected {sorted(names)}."
            )
        hints = typing.get_type_hints(kind)
        read = {n: _read(hints[n], value[n], f"{path}.{n}".lstrip(".")) for n in names}
        return kind(**read)  # pyright: ignore[reportCallIssue]
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in choices:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(choices[0], item, path) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: _read_option(item) for name, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(choices[0], value, path)
    for given, expected in ((str, Path), (int, float), (kind, kind)):
        if kind is expected and type(value) is given:
            return expected(value)
    raise TypeError(f"{path} is {value!r}; expected {kind}.")


def _read_option(value: Any) -> Any:
    """Return a keyword's value; JSON turned the keys of a dict into strings."""
    if isinstance(value, dict):
        return {int(k) if k.isdigit() else k: v for k, v in value.items()}
    return value


# For fields: the check of a value, and what was expected. None is not checked, because
# it is the default of every field that may be None.
_RULES: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    (
        (
            "steps batch_size accumulate batch_stats_from log_every eval_every "
            "checkpoint_every eval_batch_size keep"
        ),
        lambda n: n >= 1,
        "a whole number of 1 or more",
    ),
    ("seed", lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1"),
    ("devices hosts.count", lambda n: n >= 1, "1 or more"),
    ("hosts.timeout", lambda n: n >= 1, "1 or more seconds"),
    ("bn.virtual_batch_size", lambda n: n >= 2, "2 or more"),
    (
        "learning_rate bn.epsilon optim.clip_norm model.weight_scale model.width",
        lambda x: 0 < x < math.inf,
        "a positive number",
    ),
    (
        "optim.weight_decay model.weight_std",
        lambda x: 0 <= x < math.inf,
        "a number of 0 or more",
    ),
    ("ema", lambda x: 0 <= x < 1, "a number in [0, 1), the weight of the old average"),
    (
        "bn.momentum",
        lambda x: 0 <= x <= 1,
        "a number in [0, 1], the weight of the old value (PyTorch's 0.1 is 0.9 here)",
    ),
    ("model.dropout", lambda x: 0 <= x < 1, "a rate in [0, 1)"),
    ("model.hidden", lambda ns: min(ns, default=0) > 0, "one or more positive widths"),
    (
        "bn.sync",
        re.compile(r"global|per-device|group:[1-9]\d*").fullmatch,
        "global, per-device, or group:K, such as group:2",
    ),
    (
        "hosts.coordinator",
        re.compile(r"auto|.+:\d{1,5}").fullmatch,
        'ADDRESS:PORT, or "auto"',
    ),
)


def validate(config: Config) -> None:
    """Refuse values that no run can use; the message names the flag."""
    for names, accepts, expected in _RULES:
        for name in names.split():
            value = operator.attrgetter(name)(config)
            if value is not None and not accepts(value):
                _refuse(config, name, expected)
    validate_data(config.data)
    model, hosts, bn = config.model, config.hosts, config.bn
    if not is_import_path(model.name):
        if model.name not in MODELS:
            known = ", ".join(MODELS)
            own = "a function of your own, such as my_package.nets:make_net"
            _refuse(config, "model.name", f"one of {known}, or {own}", MODELS)
        refuse_options(model, models.options(model.name))
    if model.activation not in (None, *ACTIVATIONS):
        known = ", ".join(ACTIVATIONS)
        _refuse(config, "model.activation", f"one of {known}", ACTIVATIONS)
    if not 0 <= hosts.index < hosts.count:
        _refuse(config, "hosts.index", f"from 0 to --hosts.count {hosts.count} - 1")
    if hosts.coordinator is None and hosts.count > 1:
        expected = "ADDRESS:PORT of host 0 for several hosts"
        _refuse(config, "hosts.coordinator", expected)
    if not 0 <= config.optim.warmup_steps < config.steps:
        expected = f"0 or more, and fewer than the {config.steps} --steps"
        _refuse(config, "optim.warmup_steps", expected)
    if config.batch_size % config.accumulate:
        _refuse(config, "accumulate", f"a divisor of {config.batch_size}")
    if config.batch_norm and config.batch_size < 2:
        raise SettingError(
            "--batch-size 1: the statistics of batch normalization need at least 2 "
            "examples in training. Give a larger batch, or --no-batch-norm.",
        )
    if config.batch_norm and bn.implementation == "flax":
        if bn.unbiased:
            raise SettingError(
                "--bn.implementation flax supports only the biased variance: "
                "add --bn.no-unbiased.",
            )
        if (bn.sync, bn.virtual_batch_size, config.accumulate) != ("global", None, 1):
            raise SettingError(
                "--bn.implementation flax supports only the statistics of a whole "
                "batch: omit --bn.sync, --bn.virtual-batch-size and --accumulate.",
            )
    if config.resume and config.workdir is None:
        raise SettingError(
            "--resume needs the folder of the run to continue: add --workdir."
        )
    if config.init_stats != "adapt" and config.init_from is None:
        raise SettingError(
            f"--init-stats {config.init_stats}: there are no statistics to start from; "
            "add --init-from.",
        )


def _refuse(
    config: Config, field: str, expected: str, choices: Iterable[str] = ()
) -> NoReturn:
    value = operator.attrgetter(field)(config)
    hint = did_you_mean(str(value), choices)
    raise SettingError(f"{as_flag(field)} {value}: expected {expected}.{hint}")
