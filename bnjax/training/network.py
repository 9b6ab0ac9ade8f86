"""The network that a configuration names: of `bnjax.models`, or the user's own."""

import dataclasses
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
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
    is_import_path,
    refuse_options,
    set_options,
)

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def make_network(config: Config, **offered: Any) -> nn.Module:
    """Make the network of a run.

    Args:
        config: of the run.
        **offered: what every network may take: classes, normalization, dtype.

    Raises:
        SettingError: it is not to be had, or has no such option.
    """
    path, options = config.model.name, set_options(config.model)
    if not is_import_path(path):
        return models.create(path, **offered, **options)
    known = _keywords(path, {*offered, *OPTIONS})
    refuse_options(config.model, known)
    if config.dtype != "float32" and "dtype" not in known:
        raise SettingError(
            f"--dtype {config.dtype}: {path} takes no dtype. Leave it out, or let the "
            "function take it.",
        )
    options |= {name: value for name, value in offered.items() if name in known}
    try:
        network = find_factory(path)(**options)
    except Exception as error:
        raise _refused(path, f"calling it failed: {_told(error)}") from error
    if not isinstance(network, nn.Module):
        raise _refused(
            path, f"it gave {_article(network)}; expected a flax.linen.Module."
        )
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
    """Say whether the network is built on `bnjax.models.Normalization`.

    One that is not shares no statistics between the devices of a pmap, nor between
    micro-batches.

    Raises:
        SettingError: the network cannot be imported.
    """
    path = config.model.name
    offered = {*OPTIONS, "classes", "normalization", "dtype"}
    return not is_import_path(path) or "normalization" in _keywords(path, offered)


def check_network(
    config: Config, network: nn.Module, image_shape: tuple[int, ...], classes: int
) -> None:
    """Refuse a network of the user's own that cannot be trained as it is asked for.

    It is traced in training and in evaluation, and nothing is computed.

    Args:
        config: of the run.
        network: as `make_network` made it.
        image_shape: of one example.
        classes: how many labels there are.

    Raises:
        SettingError: it fails, keeps more than "params" and "batch_stats", gives no
            logits of shape (batch, classes), its statistics never change, or it cannot
            follow a flag.
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
        f"--bn.{field.name.replace('_', '-')}"
        for field in dataclasses.fields(BatchNormConfig)
        if getattr(config.bn, field.name) != field.default
    ]
    if has_statistics and config.parallel == "pmap":
        flags.append("--parallel pmap")
    if has_statistics and config.accumulate > 1:
        flags.append("--accumulate")
    if flags:
        raise SettingError(
            f"{', '.join(flags)}: the layers of {path} cannot follow, since it takes "
            "no normalization. Leave the flags out, or let the function take "
            "normalization, a bnjax.models.Normalization, and use it in its layers.",
        )


def _check_traces(
    path: str, network: nn.Module, images: jax.ShapeDtypeStruct, classes: int
) -> bool:
    """Trace the network, and return whether it keeps running statistics."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: Any, images: Any) -> Any:
        return network.init(key, images, train=False)

    def train(batch_stats: Any, params: Any, key: Any, images: Any) -> Any:
        logits, updated = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return updated.get("batch_stats", {}), logits

    def evaluate(variables: Any, images: Any) -> Any:
        return network.apply(variables, images, train=False)

    step = "initializing it"
    try:
        variables = jax.eval_shape(init, key, images)
        _check_collections(path, variables)
        batch_stats = variables.get("batch_stats", {})
        step = "calling it with train=True"
        traced = jax.make_jaxpr(train, return_shape=True)
        arguments = (batch_stats, variables["params"], key, images)
        jaxpr, (new_stats, logits) = traced(*arguments)
        step = "calling it with train=False"
        evaluated = jax.eval_shape(evaluate, variables, images)
    except ModifyScopeVariableError as error:
        raise _refused(
            path,
            "it changes its statistics with train=False. Give its BatchNorm layers "
            "use_running_average=not train.",
        ) from error
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
        raise _refused(
            path,
            "its batch_stats never change in training. Give its BatchNorm layers "
            "use_running_average=not train.",
        )
    if still:
        print(
            f"note: of {path}, batch_stats {', '.join(still)} never change in "
            "training.",
            file=sys.stderr,
        )
    return bool(leaves)


def _check_collections(path: str, variables: Mapping[str, Any]) -> None:
    others = sorted(set(variables) - {"params", "batch_stats"})
    if others:
        raise _refused(
            path,
            f"it keeps the collections {', '.join(others)}; expected params and "
            "batch_stats alone: nothing else is trained or saved.",
        )
    if "params" not in variables:
        raise _refused(path, "it has no parameters to train.")


def find_factory(path: str) -> Callable[..., Any]:
    """Import what makes a network: this runs the module's code.

    Args:
        path: "module:function"; the module is looked for where Python looks.

    Returns:
        The function, or the class.

    Raises:
        SettingError: it cannot be imported, or is nothing that makes a network.

    Example:
        >>> find_factory("flax.linen:Dens")
        Traceback (most recent call last):
        bnjax.data.config.SettingError: --model flax.linen:Dens: module flax.linen
        has no 'Dens'. Did you mean 'Dense'?
    """
    if not _PATH.fullmatch(path) or ".py:" in path:
        raise _refused(
            path,
            "expected a module and a function in it, such as my_package.nets:make_net "
            "for make_net in my_package/nets.py.",
        )
    module_name, _, name = path.partition(":")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            problem = (
                f"there is no module {missing!r}. Start train.py in the folder that "
                "holds it, or add that folder to PYTHONPATH, as other commands need it."
            )
        else:
            problem = (
                f"{module_name} imports {missing!r}, which is not installed: pip "
                "install it, or mend the import."
            )
        raise _refused(path, problem) from error
    except Exception as error:
        message = f"importing {module_name} failed: {_told(error)}"
        raise _refused(path, message) from error
    factory = getattr(module, name, None)
    if factory is None:
        public = [each for each in vars(module) if not each.startswith("_")]
        hint = did_you_mean(name, public)
        raise _refused(path, f"module {module_name} has no {name!r}.{hint}")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise _refused(
            path,
            f"{name} is {_article(factory)}; expected the function, or the class, that "
            "makes a network.",
        )
    return factory


def _keywords(path: str, offered: set[str]) -> set[str]:
    """Return which of the keywords offered the function takes; it needs no other."""
    parameters = inspect.signature(find_factory(path)).parameters.values()
    for each in parameters:
        optional = each.default is not each.empty
        if optional or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.kind is each.POSITIONAL_ONLY or each.name not in offered:
            raise _refused(
                path,
                f"it needs {each.name!r}; expected to be called with no more than "
                "classes, normalization, dtype and options of --model, by name. Give "
                f"{each.name!r} a default.",
            )
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return offered
    named = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    return offered & named


def _refused(path: str, message: str) -> SettingError:
    return SettingError(f"--model {path}: {message}")


def _article(value: Any) -> str:
    kind = type(value)
    return f"a {kind.__module__}.{kind.__qualname__}".replace("a builtins.", "a ")


def _told(error: Exception) -> str:
    """Return what went wrong, and where: outside any installed package if possible."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and not frame.filename.startswith("<frozen")
        and Path(frame.filename) != Path(__file__)
    ]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"
