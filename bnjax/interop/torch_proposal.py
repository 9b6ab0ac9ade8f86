"""Propose which PyTorch layer belongs to which Flax layer, for a person to confirm."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bnjax.interop.torch import (
    COUNTER,
    TENSORS,
    Layer,
    LayerMapping,
    Pair,
    as_layer,
    find,
    leaves_of,
    natural,
)

__all__ = ["alike", "propose_mapping", "trace"]


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Return the layers of a linen model in the order of their first calls.

    The model is called on shapes only. The arguments are those of the model, the images
    first.
    """
    layers: dict[str, Layer] = {}
    channels: int | None = args[0].shape[-1] if args[0].ndim > 3 else None
    convolved = channels is not None

    def record(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        nonlocal channels, convolved
        module = context.module
        shape = tuple(getattr(inputs[0], "shape", ())) if inputs else ()
        if context.method_name == "__call__":
            known = None
            if channels is not None and len(shape) == 2:
                a_map = shape[1] > channels and shape[1] % channels == 0
                known = channels if a_map else 1
            back = isinstance(module, nn.ConvTranspose) and not module.transpose_kernel
            path = "/".join(module.path)
            layers.setdefault(path, Layer(path, channels=known, transposed=back))
        output = call(*inputs, **options)
        convolved |= isinstance(module, nn.Conv | nn.ConvTranspose)
        if isinstance(module, nn.Dense) and len(shape) == 2:
            channels = None
        elif convolved and len(getattr(output, "shape", ())) > 2:
            channels = output.shape[-1]
        return output

    with nn.intercept_methods(record):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        jax.eval_shape(lambda *a: model.init(keys, *a, **kwargs), *args)
    return tuple(layers.values())


def propose_mapping(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    layers: Sequence[Layer] = (),
    known: LayerMapping | None = None,
) -> dict[str, str | Layer | None]:
    """Propose which PyTorch layer belongs to which Flax layer.

    The function pairs layers whose arrays have the same shapes in PyTorch's layout. If
    several layers have the same shapes, it pairs them in order, with the shortcut of a
    block as its last layer; `alike` lists these layers. It leaves out layers without a
    counterpart. A person should check the proposal.

    Args:
        state: arrays or tensors by name; shapes are enough.
        variables: the variables of the model; see `from_torch`.
        layers: the layers of the model, from `trace`. Without them, the order is that
            of the names, and the flattened feature maps are unknown.
        known: the part of the mapping that is known.

    Returns:
        The proposed mapping.

    Examples:
        >>> variables = {"params": {"conv": {"kernel": np.ones((3, 3, 1, 8))}}}
        >>> propose_mapping({"0.weight": np.ones((8, 1, 3, 3))}, variables)
        {'0': 'conv'}
    """
    known = known or {}
    called = {layer.path: layer for layer in layers}
    theirs: dict[str, set[Any]] = {}
    taken = set()
    for name in sorted(state, key=natural) if list(state) == sorted(state) else state:
        layer, _, last = name.rpartition(".")
        layer, inner = (layer, last) if last in TENSORS else (name, "")
        if (told := find(name, known)) is not None:
            taken.add(told[0] and told[0].path)
        elif last != COUNTER:
            theirs.setdefault(layer, set()).add((inner, tuple(np.shape(state[name]))))
    waiting: dict[Any, list[str]] = {}
    for path, shapes in _torch_shapes(variables, called).items():
        if path not in taken:
            waiting.setdefault(shapes, []).append(path)
    found: dict[str, str | Layer | None] = {}
    for layer in _shortcuts_last(list(theirs), "."):
        shapes = frozenset(theirs[layer])
        # A bias without a counterpart is left out: a person must say where it goes.
        weight = frozenset(each for each in shapes if each[0] == "weight")
        queue = waiting.get(shapes) or (len(shapes) == 2 and waiting.get(weight))
        if queue:
            path = queue.pop(0)
            ours = called.get(path, Layer(path))
            found[layer] = path if ours == Layer(path) else ours
    return {**known, **{layer: found[layer] for layer in theirs if layer in found}}


def alike(mapping: LayerMapping, variables: Mapping[str, Any]) -> list[str]:
    """Return the names in a proposal that depend only on the order of layers."""
    shapes = _torch_shapes(variables, {})
    counts = collections.Counter(shapes.values())
    paths = {name: as_layer(given).path for name, given in mapping.items()}
    return [name for name in paths if counts[shapes.get(paths[name], frozenset())] > 1]


def _torch_shapes(
    variables: Mapping[str, Any], called: Mapping[str, Layer]
) -> dict[str, frozenset[Any]]:
    """Return the shapes of each layer's tensors, layers in the order of PyTorch."""
    shapes: dict[str, set[Any]] = {}
    for (path, last), leaf in leaves_of(variables).items():
        back = path in called and called[path].transposed
        shape = Pair("", leaf, Layer(path, transposed=back)).torch_shape
        shapes.setdefault(path, set()).add((last, shape))
    order = {path: i for i, path in enumerate(called)}
    paths = sorted(shapes, key=lambda p: (order.get(p, len(order)), natural(p)))
    return {path: frozenset(shapes[path]) for path in _shortcuts_last(paths, "/")}


SHORTCUTS = ("downsample", "shortcut", "projection", "proj", "skip")


def _shortcuts_last(paths: Sequence[str], separator: str) -> list[str]:
    """Return paths with the shortcut of a block after the rest of the block.

    PyTorch's models define the shortcut last; other models may call it first.
    """
    parts = [tuple(path.split(separator)) for path in paths]
    last: dict[tuple[str, ...], int] = {}
    for i, path in enumerate(parts):
        last |= {path[:n]: i for n in range(1, len(path))}

    def place(i: int) -> tuple[int, bool, int]:
        for n, part in enumerate(parts[i]):
            if n and any(word in part.lower() for word in SHORTCUTS):
                return last[parts[i][:n]], True, i
        return i, False, i

    return [paths[i] for i in sorted(range(len(paths)), key=place)]
