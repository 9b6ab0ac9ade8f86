"""A run that starts from the network of another."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.data.config import DataError, SettingError
from bnjax.data.sources import Source, open_data
from bnjax.interop.torch import (
    SAME_NAMES,
    LayerMapping,
    TorchError,
    classes_in,
    from_torch,
    known_mapping,
)
from bnjax.interop.torch_files import format_mapping, read_state_dict
from bnjax.interop.torch_proposal import alike, trace
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


def source_of_weights(
    config: Config,
    state: Mapping[str, Any],
    mapping: LayerMapping,
    image_shape: Sequence[int] | None,
) -> Source:
    """Return the data set, without examples where it is not there.

    The weights say how many classes there are, and `image_shape` or --data.image-size
    which images the network takes.
    """
    if image_shape is not None:
        if len(image_shape) not in (2, 3) or min(image_shape) < 1:
            raise SettingError(
                f"--image-shape {' '.join(map(str, image_shape))}: expected a height, "
                "a width and the channels, such as 224 224 3."
            )
        shape, absent = tuple(image_shape), None
    else:
        try:
            return open_data(config.data, config.data_dir)
        except DataError as error:
            absent = error
        if (size := config.data.image_size) is None:
            raise DataError(
                f"{absent}\nOr say which images the network takes, and the weights "
                "tell the rest: --image-shape HEIGHT WIDTH CHANNELS."
            ) from absent
        shape = (size, size, 3)
    known = known_mapping(config.model.name, shape) or {}
    classes = classes_in(state, {**mapping, **known, **mapping})
    if classes is None:
        raise absent or SettingError(
            "--image-shape: no tensor goes to the layer logits, and the number of "
            "classes is not known. Prepare the data set, and leave the flag out."
        )
    description = {"image_shape": shape, "classes": classes}
    return Source.from_description(config.data, description)


def unconfirmed(
    file: Path, config: Config, proposed: LayerMapping, variables: Mapping[str, Any]
) -> TorchError:
    """Return the error that shows a proposed mapping, to be confirmed."""
    by_order = ", ".join(alike(proposed, variables)) or "none"
    return TorchError(
        f"{file} was not imported: no mapping is known for {config.model.name}. By the "
        f"shapes of its arrays it could be:\n{format_mapping(proposed)}\n"
        f"By order alone, since others have the same shapes: {by_order}. If all of it "
        "is right, add --confirm; else write it to a file, put it right, and give "
        "--mapping FILE."
    )
