"""The network of a configuration, from `bnjax.models` or from the user."""

import dataclasses
import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ModifyScopeVariableError

from bnjax import models
from bnjax._validate import did_you_mean, first_line
from bnjax.data.config import SettingError
from bnjax.training.config import (
    OPTIONS,
    BatchNormConfig,
    Config,
    as_flag,
    is_import_path,
    refuse_options,
    set_options,
)

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_NO_AVERAGE = "Give its BatchNorm layers use_running_average=not train."


def make_network(config: Config, **offered: Any) -> nn.Module:
    """Return the network of a run.

    Args:
        config: the configuration of the run.
        **offered: keywords that a network may take: classes, normalization, dtype.

    Returns:
        The module.

    Raises:
        SettingError: if the network cannot be made.
    """
    path, options = config.model.name, set_options(config.model)
    if not is_import_path(path):
        return models.create(path, **offered, **options)
    known = _keywords(path, {*offered, *OPTIONS})
    refuse_options(config.model, known)
    if config.dtype != "float32" and "dtype" not in known:
        raise SettingError(
            f"--dtype {config.dtype}: {path} takes no dtype. Omit the flag, or give "
            "the function an argument dtype.",
        )
    options |= {name: value for name, value in offered.items() if name in known}
    try:
        network = _find_factory(path)(**options)
    except Exception as error:
        raise _refused(path, f"calling it failed: {_told(error)}") from error
    if not isinstance(network, nn.Module):
        message = f"it returned {_article(network)}; expected a flax.linen.Module."
        raise _refused(path, message)
    parameters = inspect.signature(network.__call__).parameters.values()
    if not any(p.name == "train" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise _refused(
            path,
            f"{type(network).__name__}.__call__ takes "
            f"{', '.join(p.name for p in parameters)}; expected images and train: it "
            "is called as model(images, train=True) in training, and with train=False "
            "in evaluation.",
        )
    return network


def takes_normalization(config: Config) -> bool:
    """Return whether the network uses `bnjax.models.Normalization`.

    A network without it cannot share statistics between the devices of a pmap or
    between micro-batches.
    """
    path = config.model.name
    offered = {*OPTIONS, "classes", "normalization", "dtype"}
    return not is_import_path(path) or "normalization" in _keywords(path, offered)


def check_network(
    config: Config, network: nn.Module, image_shape: tuple[int, ...], classes: int
) -> None:
    """Refuse a user's network that does not support the requested training.

    The network is traced in training and in evaluation, without computing anything.
    """
    path = config.model.name
    if not is_import_path(path):
        return
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    has_statistics = _check_traces(path, network, images, classes)
    if takes_normalization(config):
        return
    flags = ["--init-stats freeze"] if config.init_stats == "freeze" else []
    if not config.batch_norm:
        flags.append("--no-batch-norm")
    flags += [
        as_flag(f"bn.{field.name}")
        for field in dataclasses.fields(BatchNormConfig)
        if getattr(config.bn, field.name) != field.default
    ]
    if has_statistics and config.parallel == "pmap":
        flags.append("--parallel pmap")
    if has_statistics and config.accumulate > 1:
        flags.append("--accumulate")
    if flags:
        raise SettingError(
            f"{', '.join(flags)}: the layers of {path} cannot apply these flags, "
            "because it takes no normalization. Omit the flags, or give the function "
            "an argument normalization, a bnjax.models.Normalization for its layers.",
        )


def _check_traces(
    path: str, network: nn.Module, images: jax.ShapeDtypeStruct, classes: int
) -> bool:
    """Trace the network, and return whether it keeps running statistics."""

    def train(batch_stats: Any, params: Any, key: Any, images: Any) -> Any:
        logits, updated = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return updated.get("batch_stats", {}), logits

    key = jax.eval_shape(lambda: jax.random.key(0))
    step = "initializing it"
    try:
        init = functools.partial(network.init, train=False)
        variables = jax.eval_shape(init, key, images)
        if others := sorted(set(variables) - {"params", "batch_stats"}):
            raise _refused(
                path,
                f"it keeps the collections {', '.join(others)}; expected only params "
                "and batch_stats: no other collection is trained or saved.",
            )
        if "params" not in variables:
            raise _refused(path, "it has no parameters to train.")
        batch_stats = variables.get("batch_stats", {})
        step = "calling it with train=True"
        traced = jax.make_jaxpr(train, return_shape=True)
        arguments = (batch_stats, variables["params"], key, images)
        jaxpr, (new_stats, logits) = traced(*arguments)
        step = "calling it with train=False"
        evaluate = functools.partial(network.apply, train=False)
        evaluated = jax.eval_shape(evaluate, variables, images)
    except ModifyScopeVariableError as error:
        message = f"it changes its statistics with train=False. {_NO_AVERAGE}"
        raise _refused(path, message) from error
    except SettingError:
        raise
    except Exception as error:
        message = f"{step} on images of shape {images.shape} failed: {_told(error)}"
        raise _refused(path, message) from error
    for result in (logits, evaluated):
        shape = getattr(result, "shape", None)
        if shape != (2, classes):
            got = f"shape {shape}" if shape is not None else _article(result)
            raise _refused(
                path,
                f"images of shape {images.shape} give {got}; expected logits of shape "
                f"{(2, classes)}, one for each of the {classes} classes.",
            )
    if jax.tree.map(jnp.shape, new_stats) != jax.tree.map(jnp.shape, batch_stats):
        raise _refused(path, "the shapes of its batch_stats change in training.")
    leaves = jax.tree_util.tree_leaves_with_path(batch_stats)
    pairs = zip(leaves, jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars, strict=False)
    still = [
        jax.tree_util.keystr(leaf[0], simple=True, separator=".")
        for leaf, old, new in pairs
        if old is new
    ]
    if leaves and len(still) == len(leaves):
        message = f"its batch_stats never change in training. {_NO_AVERAGE}"
        raise _refused(path, message)
    if still:
        names = ", ".join(still)
        note = f"note: of {path}, batch_stats {names} never change in training."
        print(note, file=sys.stderr)
    return bool(leaves)


def _find_factory(path: str) -> Callable[..., Any]:
    """Import the function "module:function"; this runs the code of the module."""
    if not _PATH.fullmatch(path) or ".py:" in path:
        raise _refused(
            path,
            "expected a module and a function in the module, such as "
            "my_package.nets:make_net for make_net in my_package/nets.py.",
        )
    module_name, _, name = path.partition(":")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        problem = f"importing {module_name} failed: {_told(error)}"
        if isinstance(error, ModuleNotFoundError):
            missing = error.name or ""
            problem = (
                f"{module_name} imports {missing!r}, which is not installed: install "
                "it with pip, or fix the import."
            )
            if f"{module_name}.".startswith(f"{missing}."):
                problem = (
                    f"there is no module {missing!r}. Start train.py in the folder "
                    "of the module, or add that folder to PYTHONPATH, which other "
                    "commands need too."
                )
        raise _refused(path, problem) from error
    factory = getattr(module, name, None)
    if factory is None:
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise _refused(path, f"module {module_name} has no {name!r}.{hint}")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise _refused(
            path,
            f"{name} is {_article(factory)}; expected a function or a class that makes "
            "a network.",
        )
    return factory


def _keywords(path: str, offered: set[str]) -> set[str]:
    """Return the offered keywords that the function takes; refuse a required other."""
    parameters = inspect.signature(_find_factory(path)).parameters.values()
    for each in parameters:
        optional = each.default is not each.empty
        if optional or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.kind is each.POSITIONAL_ONLY or each.name not in offered:
            raise _refused(
                path,
                f"it needs {each.name!r}; expected only the keywords classes, "
                "normalization, dtype and options of --model. Give "
                f"{each.name!r} a default.",
            )
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return offered
    return offered & {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def _refused(path: str, message: str) -> SettingError:
    return SettingError(f"--model {path}: {message}")


def _article(value: Any) -> str:
    kind = type(value)
    return f"a {kind.__module__}.{kind.__qualname__}".replace("a builtins.", "a ")


def _told(error: Exception) -> str:
    """Return the error and its place, outside installed packages if possible."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        installed = "site-packages" in frame.filename
        if not installed and not frame.filename.startswith(("<frozen", __file__)):
            place = f" ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {first_line(error)}{place}"
