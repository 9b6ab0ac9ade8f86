"""What is refused before anything starts."""

import math
import re

from bnjax import models
from bnjax._validate import ACTIVATIONS, did_you_mean
from bnjax.data.config import validate_data
from bnjax.models import MODELS
from bnjax.training.config import Config, HostsConfig, ModelConfig
from bnjax.training.errors import USAGE, UserError
from bnjax.training.networks import refuse_options
from bnjax.training.own_network import is_import_path


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
    _model(config.model)
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
    if config.init_stats != "adapt" and config.init_from is None:
        raise UserError(
            f"--init-stats {config.init_stats}: there are no statistics to start from; "
            "add --init-from.",
            USAGE,
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
    raise UserError(f"{flag} {value}: expected {expected}.{hint}", USAGE)
