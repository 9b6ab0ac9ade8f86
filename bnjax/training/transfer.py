"""A run that starts from the network of another."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.data.augment import CentralCrop
from bnjax.data.config import DataConfig, SettingError
from bnjax.data.sources import Source
from bnjax.interop.torch import (
    SAME_NAMES,
    TorchError,
    classes_in,
    from_torch,
    known_mapping,
)
from bnjax.interop.torch_files import read_state_dict
from bnjax.interop.torch_proposal import trace
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.config import Config
from bnjax.training.program import Program
from bnjax.training.step import TrainState
from bnjax.training.workdir import CHECKPOINTS, CONFIG, read_config

Tree = dict[str, Any]
SHOWN = 6
"""How many arrays a message names."""


def first_state(config: Config, program: Program) -> TrainState:
    """Return the state before the first step, from `--init-from` where it is given.

    Args:
        config: of the new run.
        program: of the new run; its optimizer starts anew.

    Raises:
        RunError: there is nothing to start from, or it is another network.
    """
    state = program.initial_state()
    if config.init_from is None:
        return state
    if config.init_from.is_file():
        params, batch_stats = read_weights(config.init_from, config, program, state)
    else:
        params, batch_stats = read_network(config.init_from)
    source = f"--init-from {config.init_from}"
    adopted, anew = adopt(state.params, params, program.classes, source)
    if config.init_stats == "reset":
        batch_stats = state.batch_stats
    else:
        batch_stats, _ = adopt(state.batch_stats, batch_stats, None, source)
    count = len(jax.tree.leaves(adopted))
    what = f"; new: {', '.join(anew)}" if anew else ""
    print(
        f"starting from {count - len(anew)} of {count} arrays of "
        f"{config.init_from}{what}",
        file=sys.stderr,
    )
    return dataclasses.replace(
        state,
        params=adopted,
        batch_stats=batch_stats,
        opt_state=program.optimizer.init(adopted),
    )


def read_network(path: Path) -> tuple[Tree, Tree]:
    """Read parameters and running statistics from the folder of a run.

    Raises:
        RunError: it is no run, it has no checkpoint, or none is whole.
    """
    if not (path / CONFIG).is_file() or not (path / CHECKPOINTS).is_dir():
        raise SettingError(
            f"--init-from {path}: expected the folder of a run that wrote a checkpoint "
            f"({CONFIG} and {CHECKPOINTS} in it).",
        )
    with open_checkpoints(path, read_config(path), read_only=True) as checkpoints:
        tree = checkpoints.restore_tree()
    return tree["params"], tree["batch_stats"] or {}


def read_weights(
    path: Path, config: Config, program: Program, state: TrainState
) -> tuple[Tree, Tree]:
    """Read parameters and running statistics from a file of PyTorch's.

    Its layers are called as `known_mapping` says, or as the network's own. A last layer
    of other classes is as in the file.

    Raises:
        TorchError: the file cannot be read, or holds another network.
    """
    tensors = read_state_dict(path)
    mapping = known_mapping(config.model.name, program.images.shape[1:]) or SAME_NAMES
    params: dict[str, Any] = dict(flatten_dict(state.params, sep="/"))
    called = trace(program.model, program.images, train=False)
    last = next(e.path for e in reversed(called) if f"{e.path}/kernel" in params)
    classes = classes_in(tensors, mapping, last)
    for name in (f"{last}/kernel", f"{last}/bias"):
        if name in params and classes is not None:
            shape = (*params[name].shape[:-1], classes)
            params[name] = jax.ShapeDtypeStruct(shape, params[name].dtype)
    variables = {
        "params": unflatten_dict(params, sep="/"),
        "batch_stats": state.batch_stats,
    }
    try:
        found = from_torch(tensors, variables, mapping)
    except TorchError as error:
        raise TorchError(
            f"--init-from {path}: {error} Where its layers have other names: python -m "
            "bnjax import-torch with --mapping, then --init-from the run it writes."
        ) from error
    return found["params"], found["batch_stats"]


def describe_data(source: Source) -> dict[str, Any]:
    """Return what a network is to be told of its data set, as JSON holds it."""
    return {
        "name": source.name,
        "image_shape": source.image_shape,
        "classes": source.classes,
        "max_value": source.max_value,
        "class_names": source.class_names,
    }


def described_source(data: DataConfig, described: Mapping[str, Any]) -> Source:
    """Return a data set without examples, for a run whose own is not there.

    Args:
        data: of the run.
        described: as `describe_data` gave it.

    Example:
        >>> described = {"image_shape": [32, 32, 3], "classes": 10}
        >>> source = described_source(DataConfig(name="cifar10"), described)
        >>> source.image_shape, source.sizes
        ((32, 32, 3), {})
    """
    names, size = described.get("class_names"), data.image_size
    return Source(
        name=described.get("name", data.name),
        splits={},
        classes=described["classes"],
        image_shape=tuple(described["image_shape"]),
        max_value=described.get("max_value", 255),
        resize=CentralCrop(size, data.central_crop) if size else None,
        class_names=tuple(names) if names else None,
    )


def adopt(
    own: Tree, given: Tree, classes: int | None, source: str
) -> tuple[Tree, list[str]]:
    """Return the tree `own` with the values of `given`.

    Args:
        own: nested dicts of arrays.
        given: the same of another network. An array whose last axis is not of
            `classes` entries, where that of `own` is, and which is else of the same
            shape, belongs to a layer that tells other classes apart: `own`'s stays.
        classes: how many classes `own` has; None where every array has to fit.
        source: where `given` is from, for messages.

    Returns:
        The tree, and the paths of the arrays that stayed.

    Raises:
        RunError: an array is missing, too many or of another shape.

    Example:
        >>> own = {"conv": {"bias": jnp.zeros(2)}, "logits": {"bias": jnp.zeros(3)}}
        >>> given = {"conv": {"bias": jnp.ones(2)}, "logits": {"bias": jnp.ones(5)}}
        >>> tree, anew = adopt(own, given, 3, "--init-from run")
        >>> print(tree["conv"]["bias"], anew)
        [1. 1.] ['logits/bias']
    """
    ours: dict[str, Any] = dict(flatten_dict(own, sep="/"))
    theirs: dict[str, Any] = dict(flatten_dict(given, sep="/"))
    anew = [
        path
        for path, leaf in ours.items()
        if path in theirs and _tells_other_classes(leaf, theirs[path], classes)
    ]
    problems = [f"{path} is not there" for path in ours if path not in theirs]
    problems += [f"{path} has no place here" for path in theirs if path not in ours]
    problems += [
        f"{path} has the shape {theirs[path].shape}, {leaf.shape} here"
        for path, leaf in ours.items()
        if path in theirs and path not in anew and leaf.shape != theirs[path].shape
    ]
    if problems:
        more = len(problems) - SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise SettingError(
            f"{source} holds another network: {'; '.join(problems[:SHOWN])}{rest}. "
            "Give the --model and --batch-norm flags that it was trained with.",
        )
    taken = {
        path: leaf if path in anew else jnp.asarray(theirs[path], leaf.dtype)
        for path, leaf in ours.items()
    }
    return unflatten_dict(taken, sep="/"), anew


def _tells_other_classes(own: Any, given: Any, classes: int | None) -> bool:
    return (
        own.shape != given.shape
        and own.shape[:-1] == given.shape[:-1]
        and own.shape[-1] == classes
    )
