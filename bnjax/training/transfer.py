"""Start a run from the network of another run, or from PyTorch weights."""

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
    prefer,
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
"""The largest number of arrays in a message."""


def first_state(config: Config, program: Program) -> TrainState:
    """Return the state before the first step, from `--init-from` if it is given."""
    state = program.initial_state()
    if config.init_from is None:
        return state
    path = config.init_from
    if path.is_file():
        given = _read_weights(path, config, program, state)
    elif (path / CONFIG).is_file() and (path / CHECKPOINTS).is_dir():
        with open_checkpoints(path, read_config(path), read_only=True) as checkpoints:
            given = checkpoints.restore_tree()
    else:
        raise SettingError(
            f"--init-from {path}: expected the folder of a run that wrote a checkpoint "
            f"({CONFIG} and {CHECKPOINTS} in it).",
        )
    source = f"--init-from {path}"
    adopted, new = _adopt(state.params, given["params"], program.classes, source)
    batch_stats = state.batch_stats
    if config.init_stats != "reset":
        theirs = given["batch_stats"] or {}
        batch_stats, _ = _adopt(batch_stats, theirs, None, source)
    count = len(jax.tree.leaves(adopted))
    what = f"; new: {', '.join(new)}" if new else ""
    print(
        f"starting from {count - len(new)} of {count} arrays of {path}{what}",
        file=sys.stderr,
    )
    return dataclasses.replace(
        state,
        params=adopted,
        batch_stats=batch_stats,
        opt_state=program.optimizer.init(adopted),
    )


def _read_weights(
    path: Path, config: Config, program: Program, state: TrainState
) -> Tree:
    """Return variables from a PyTorch file; the last layer has the file's classes.

    The names of its layers are those of `known_mapping`, or those of the network.
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
    own = unflatten_dict(params, sep="/")
    variables = {"params": own, "batch_stats": state.batch_stats}
    try:
        return from_torch(tensors, variables, mapping)
    except TorchError as error:
        raise TorchError(
            f"--init-from {path}: {error} If its layers have other names, run python "
            "-m bnjax import-torch with --mapping, then --init-from its new run."
        ) from error


def _adopt(
    own: Tree, given: Tree, classes: int | None, source: str
) -> tuple[Tree, list[str]]:
    """Return the tree `own` with the values of `given`, and the paths that stay new.

    An array stays new if its last axis has `classes` entries, the array of `given` has
    another number, and their other axes are equal: its layer is for other classes.
    """
    ours: dict[str, Any] = dict(flatten_dict(own, sep="/"))
    theirs: dict[str, Any] = dict(flatten_dict(given, sep="/"))
    other = [p for p in ours if p in theirs and ours[p].shape != theirs[p].shape]
    new = [
        path
        for path in other
        if (*theirs[path].shape[:-1], classes) == ours[path].shape
    ]
    problems = [f"{path} is missing" for path in ours if path not in theirs]
    problems += [f"{path} is unknown here" for path in theirs if path not in ours]
    problems += [
        f"{path} has the shape {theirs[path].shape}, here {ours[path].shape}"
        for path in other
        if path not in new
    ]
    if problems:
        more = len(problems) - SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise SettingError(
            f"{source} holds another network: {'; '.join(problems[:SHOWN])}{rest}. "
            "Give the --model and --batch-norm flags of its training.",
        )
    taken = {
        path: leaf if path in new else jnp.asarray(theirs[path], leaf.dtype)
        for path, leaf in ours.items()
    }
    return unflatten_dict(taken, sep="/"), new


def source_of_weights(
    config: Config,
    state: Mapping[str, Any],
    mapping: LayerMapping,
    image_shape: Sequence[int] | None,
) -> Source:
    """Return the data set; if it does not exist, return one without examples.

    In that case the weights give the number of classes, and `image_shape` or
    --data.image-size the shape of the images.
    """
    if image_shape is not None:
        if len(image_shape) not in (2, 3) or min(image_shape) < 1:
            raise SettingError(
                f"--image-shape {' '.join(map(str, image_shape))}: expected the "
                "height, the width and the channels, such as 224 224 3."
            )
        shape, absent = tuple(image_shape), None
    else:
        try:
            return open_data(config.data, config.data_dir)
        except DataError as error:
            absent = error
        if (size := config.data.image_size) is None:
            raise DataError(
                f"{absent}\nOr give the shape of the network's images; the weights "
                "have the rest: --image-shape HEIGHT WIDTH CHANNELS."
            ) from absent
        shape = (size, size, 3)
    known = known_mapping(config.model.name, shape) or {}
    classes = classes_in(state, prefer(mapping, known))
    if classes is None:
        raise absent or SettingError(
            "--image-shape: no tensor goes to the layer logits, so the number of "
            "classes is not known. Prepare the data set, and omit the flag."
        )
    description = {"image_shape": shape, "classes": classes}
    return Source.from_description(config.data, description)
