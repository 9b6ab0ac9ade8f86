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
EXAMPLE = "my_package.nets:make_net"


def find_factory(path: str) -> Callable[..., Any]:
    """Import what makes a network.

    Args:
        path: "module:function"; the module is looked for in the current folder first.

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
            f"expected a module and a function in it, such as {EXAMPLE} for make_net "
            "in my_package/nets.py.",
        )
    module_name, _, name = path.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            raise _refused(
                path,
                f"there is no module {missing!r}, neither in {folder} nor installed. "
                "Start the program in the folder that holds it, or add that folder to "
                "PYTHONPATH.",
            ) from error
        raise _refused(
            path,
            f"{module_name} imports {missing!r}, which is not installed: pip install "
            "it, or mend the import.",
        ) from error
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


def accepted(path: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the function at `path` takes of what is offered by name.

    Raises:
        SettingError: it needs something else.
    """
    parameters = inspect.signature(find_factory(path)).parameters.values()
    named = {
        each.name: each
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    for each in parameters:
        required = each.default is each.empty and each.kind not in (
            each.VAR_POSITIONAL,
            each.VAR_KEYWORD,
        )
        if required and (each.name not in named or each.name not in offered):
            raise _refused(
                path,
                f"it needs {each.name!r}; expected to be called with no more than "
                "classes, normalization, dtype and options of --model, by name. Give "
                f"{each.name!r} a default.",
            )
    everything = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return {name: offered[name] for name in offered if everything or name in named}


def make_own_network(path: str, options: Mapping[str, Any]) -> nn.Module:
    """Make the network.

    Args:
        path: of the function.
        options: what it is called with; `accepted` gives them.

    Raises:
        SettingError: it fails, or what it gives is not called as
            `model(images, train=...)`.
    """
    factory = find_factory(path)
    try:
        network = factory(**options)
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


def check_own_network(
    path: str, network: nn.Module, image_shape: tuple[int, ...], classes: int
) -> bool:
    """Trace the network in training and in evaluation, computing nothing.

    Args:
        path: names the network in messages.
        network: to trace.
        image_shape: of one example.
        classes: how many logits are expected.

    Returns:
        Whether it keeps running statistics.

    Raises:
        SettingError: it fails, keeps more than "params" and "batch_stats", gives no
            logits of shape (batch, classes), or its statistics never change.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shown = f"images of shape {images.shape}"

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
        arguments = (batch_stats, variables["params"], key, images)
        jaxpr, (new_stats, logits) = jax.make_jaxpr(train, return_shape=True)(
            *arguments
        )
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
        raise _refused(path, f"{step} on {shown} failed: {_told(error)}") from error
    for result in (logits, evaluated):
        shape = getattr(result, "shape", None)
        if shape != (2, classes):
            got = f"shape {shape}" if shape is not None else _article(result)
            raise _refused(
                path,
                f"{shown} give {got}; expected logits of shape {(2, classes)}, one for "
                f"each of the {classes} classes.",
            )
    if not batch_stats:
        return False
    if jax.tree.map(jnp.shape, new_stats) != jax.tree.map(jnp.shape, batch_stats):
        raise _refused(path, "the shapes of its batch_stats change in training.")
    still = [
        name
        for name, old, new in zip(
            map(_name, jax.tree_util.tree_leaves_with_path(batch_stats)),
            jaxpr.jaxpr.invars,
            jaxpr.jaxpr.outvars,
            strict=False,
        )
        if old is new
    ]
    if len(still) == len(jax.tree.leaves(batch_stats)):
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
    return True


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


def _name(leaf: tuple[Any, Any]) -> str:
    return jax.tree_util.keystr(leaf[0], simple=True, separator=".")


def _article(value: Any) -> str:
    kind = type(value)
    return f"a {kind.__module__}.{kind.__qualname__}".replace("a builtins.", "a ")


def _told(error: Exception) -> str:
    """Return what went wrong, and where: outside any installed package if possible."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename]
    own = [f for f in own if Path(f.filename) != Path(__file__)]
    own = [f for f in own if not f.filename.startswith("<frozen")]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def _refused(path: str, message: str) -> SettingError:
    return SettingError(f"--model {path}: {message}")


def make_network(config: Config, **offered: Any) -> nn.Module:
    """Make the network of a run.

    Args:
        config: of the run.
        **offered: what every network may take: classes, normalization, dtype.

    Raises:
        SettingError: it is not to be had, or has no such option.
    """
    name = config.model.name
    chosen = set_options(config.model)
    if not is_import_path(name):
        return models.create(name, **offered, **chosen)
    known = accepted(name, offered | dict.fromkeys(OPTIONS))
    refuse_options(config.model, known)
    if config.dtype != "float32" and "dtype" not in known:
        raise SettingError(
            f"--dtype {config.dtype}: {name} takes no dtype. Leave it out, or let the "
            "function take it.",
        )
    given = {each: value for each, value in offered.items() if each in known}
    return make_own_network(name, given | chosen)


def takes_normalization(config: Config) -> bool:
    """Say whether the network is built on `bnjax.models.Normalization`.

    One that is not shares no statistics between the devices of a pmap, nor between
    micro-batches.

    Raises:
        SettingError: the network cannot be imported.
    """
    name = config.model.name
    if not is_import_path(name):
        return True
    offered = dict.fromkeys((*OPTIONS, "classes", "normalization", "dtype"))
    return "normalization" in accepted(name, offered)


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
        SettingError: saying what is wrong with it, or which flag it cannot follow.
    """
    name = config.model.name
    if not is_import_path(name):
        return
    has_statistics = check_own_network(name, network, image_shape, classes)
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
        raise SettingError(
            f"{', '.join(flags)}: the layers of {name} cannot follow, since it takes "
            "no normalization. Leave the flags out, or let the function take "
            "normalization, a bnjax.models.Normalization, and use it in its layers.",
        )
