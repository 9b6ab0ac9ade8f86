"""The network that a configuration names, and the options that it takes."""

import dataclasses
from collections.abc import Collection
from typing import Any

from flax import linen as nn

from bnjax import models
from bnjax._validate import did_you_mean
from bnjax.training import own_network
from bnjax.training.config import BatchNormConfig, Config, ModelConfig
from bnjax.training.errors import USAGE, UserError

OPTIONS = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name != "name"
)


def make_network(config: Config, **offered: Any) -> nn.Module:
    """Make the network of a run.

    Args:
        config: of the run.
        **offered: what every network may take: classes, normalization, dtype.

    Raises:
        UserError: it is not to be had, or has no such option.
    """
    name = config.model.name
    chosen = set_options(config.model)
    if not own_network.is_import_path(name):
        return models.create(name, **offered, **chosen)
    known = own_network.taken(name, offered | dict.fromkeys(OPTIONS))
    refuse_options(config.model, known)
    if config.dtype != "float32" and "dtype" not in known:
        raise UserError(
            f"--dtype {config.dtype}: {name} takes no dtype. Leave it out, or let the "
            "function take it.",
            USAGE,
        )
    given = {each: value for each, value in offered.items() if each in known}
    return own_network.make(name, given | chosen)


def takes_normalization(config: Config) -> bool:
    """Say whether the network is built on `bnjax.models.Normalization`.

    One that is not shares no statistics between the devices of a pmap, nor between
    micro-batches.

    Raises:
        UserError: the network cannot be imported.
    """
    name = config.model.name
    if not own_network.is_import_path(name):
        return True
    offered = dict.fromkeys((*OPTIONS, "classes", "normalization", "dtype"))
    return "normalization" in own_network.taken(name, offered)


def check_network(
    config: Config, network: nn.Module, image_shape: tuple[int, ...], classes: int
) -> None:
    """Refuse a network of the user's own that cannot be trained as it is asked for.

    Args:
        config: of the run.
        network: as `make_network` made it.
        image_shape: of one example.
        classes: how many labels there are.

    Raises:
        UserError: saying what is wrong with it, or which flag it cannot follow.
    """
    name = config.model.name
    if not own_network.is_import_path(name):
        return
    has_statistics = own_network.check(name, network, image_shape, classes)
    if takes_normalization(config):
        return
    flags = []
    if config.init_stats == "freeze":
        flags.append("--init-stats freeze")
    if not config.batch_norm:
        flags.append("--no-batch-norm")
    default = BatchNormConfig()
    flags += [
        f"--bn.{field.name.replace('_', '-')}"
        for field in dataclasses.fields(default)
        if getattr(config.bn, field.name) != getattr(default, field.name)
    ]
    if has_statistics and config.parallel == "pmap":
        flags.append("--parallel pmap")
    if has_statistics and config.accumulate > 1:
        flags.append("--accumulate")
    if flags:
        raise UserError(
            f"{', '.join(flags)}: the layers of {name} cannot follow, since it takes "
            "no normalization. Leave the flags out, or let the function take "
            "normalization, a bnjax.models.Normalization, and use it in its layers.",
            USAGE,
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
        UserError: naming the option, and those that there are.

    Example:
        >>> refuse_options(ModelConfig(name="lenet", width=0.5), ("pool",))
        Traceback (most recent call last):
        bnjax.training.errors.UserError: --model.width 0.5: lenet has no such option;
        it has --model.pool.
    """
    for name, value in set_options(model).items():
        if name in known:
            continue
        has = [f"--model.{each.replace('_', '-')}" for each in OPTIONS if each in known]
        raise UserError(
            f"--model.{name.replace('_', '-')} {value}: {model.name} has no such "
            f"option; it has {', '.join(has) or 'none'}.{did_you_mean(name, known)}",
            USAGE,
        )
