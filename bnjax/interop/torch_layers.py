"""The layers of a Flax model: their order, and how their arrays differ from PyTorch's.

A kernel is laid out (height, width, in, out) here and (out, in, height, width) there; a
feature map that is flattened comes in the order (height, width, channels) here and
(channels, height, width) there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.core import unfreeze

from bnjax.interop.torch_files import TorchError, natural
from bnjax.interop.torch_trace import Call

NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
"""What a leaf of Flax is called in PyTorch."""

SHORTCUTS = ("downsample", "shortcut", "projection", "proj", "skip")
COLLECTIONS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of PyTorch becomes one of Flax.

    Args:
        axes: its axes in Flax's order; None: as they are.
        flipped: how many of the first axes then run backward.
        channels: of the feature map whose flattened entries the first axis then is;
            None: it is none.
    """

    axes: tuple[int, ...] | None = None
    flipped: int = 0
    channels: int | None = None

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Return PyTorch's array in Flax's layout.

        Example:
            >>> Layout(axes=(1, 0), channels=2).from_torch(np.arange(6)[None]).ravel()
            array([0, 3, 1, 4, 2, 5])
        """
        if self.axes is not None:
            array = array.transpose(self.axes)
        array = np.flip(array, tuple(range(self.flipped)))
        return array if self.channels is None else _swapped(array, self.channels)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return Flax's array in PyTorch's layout: the inverse of `from_torch`."""
        if self.channels is not None:
            array = _swapped(array, array.shape[0] // self.channels)
        array = np.flip(array, tuple(range(self.flipped)))
        return array if self.axes is None else array.transpose(np.argsort(self.axes))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in PyTorch of what has `shape` in Flax."""
        if self.axes is None:
            return shape
        return tuple(shape[i] for i in np.argsort(self.axes))

    def __str__(self) -> str:
        rank = len(self.axes or ())
        pixels = "DHW"[5 - rank :]
        order = {0: "", 2: "out,in -> in,out"}.get(rank, f"OI{pixels} -> {pixels}IO")
        if self.flipped:
            order = f"IO{pixels} -> {pixels}IO, flipped"
        if self.channels is None:
            return order
        rows = f"flattened CHW -> HWC, C = {self.channels}"
        return f"{order}; {rows}" if order else rows


def _swapped(array: np.ndarray, rows: int) -> np.ndarray:
    """Transpose the matrix with so many rows that the first axis stands for."""
    matrix = array.reshape(rows, -1, *array.shape[1:])
    return matrix.swapaxes(0, 1).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of Flax, and what it is in PyTorch.

    Args:
        path: in the variables, ("params", "conv1", "kernel").
        shape: of the array.
        name: "weight", "bias", "running_mean", "running_var"; "" for an array that
            belongs to no layer.
        layout: from PyTorch's array to this.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    name: str
    layout: Layout = Layout()

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of PyTorch's array."""
        return self.layout.torch_shape(self.shape)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The arrays that belong together: of one convolution, one normalization.

    Args:
        path: "conv1/bn", in the variables.
        leaves: its arrays.
    """

    path: str
    leaves: tuple[Leaf, ...]


def layers_of(
    variables: Mapping[str, Any],
    calls: Sequence[Call] | None = None,
    channels: Mapping[str, int | None] | None = None,
) -> list[Layer]:
    """Return the layers of a model's variables, in order.

    Args:
        variables: the collections "params" and "batch_stats" of linen, or the tree of
            `nnx.to_pure_dict`.
        calls: from `trace`. Without them the order is that of the dicts or, where one
            is alphabetical, that of its names with numbers as numbers.
        channels: of the feature map that reaches a layer flattened, by path; None
            where none does.

    Raises:
        TorchError: without calls, what reaches a matrix flattened cannot be told; or
            the channels given do not divide its rows.
    """
    variables = unfreeze(dict(variables))
    found: dict[str, list[tuple[tuple[Any, ...], tuple[int, ...]]]] = {}
    collections = [each for each in COLLECTIONS if each in variables]
    trees = {each: variables[each] for each in collections} or variables
    for path, shape in _walk(trees):
        place = path[1:] if collections else path
        if place[-1] in NAMES:
            place = place[:-1]
        found.setdefault("/".join(map(str, place)), []).append((path, shape))
    if calls is not None:
        order = {call.path: i for i, call in enumerate(calls)}
        paths = sorted(found, key=lambda path: order.get(path, len(order)))
        known = {call.path: call for call in calls}
    else:
        paths = list(found)
        flattened = _first_matrix(found, channels or {})
        known = {p: Call(p, _guess(p), flattened.get(p)) for p in paths}
    for path, given in (channels or {}).items():
        call = known.get(path, Call(path, _guess(path)))
        known[path] = dataclasses.replace(call, channels=given)
    return [
        _layer(path, known.get(path, Call(path, _guess(path))), found[path])
        for path in paths
    ]


def shortcuts_last(paths: Sequence[str], separator: str = "/") -> list[str]:
    """Return paths with the shortcut of a block behind the rest of the block.

    PyTorch's models define it last, where others call it first.

    Example:
        >>> shortcuts_last(["block1/projection/conv", "block1/conv1", "block2/conv1"])
        ['block1/conv1', 'block1/projection/conv', 'block2/conv1']
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


def _walk(tree: Mapping[Any, Any], path: tuple[Any, ...] = ()) -> Any:
    keys = list(tree)
    names = [str(key) for key in keys]
    if names == sorted(names):
        keys.sort(key=lambda key: natural(str(key)))
    for key in keys:
        value = tree[key]
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, key))
        elif value is not None:
            yield (*path, key), tuple(np.shape(value))


def _guess(path: str) -> str:
    return "transposed" if "convtranspose" in path.lower() else "conv"


def _first_matrix(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, int]:
    """Return the channels of the map that reaches the first matrix flattened.

    By names alone that is known where it is the last convolution's or no other's.
    """
    kernels = {
        path: shape
        for path, leaves in found.items()
        for (*_, name), shape in leaves
        if name == "kernel"
    }
    convolutions = [shape[-1] for shape in kernels.values() if len(shape) > 2]
    matrices = [path for path, shape in kernels.items() if len(shape) == 2]
    if not convolutions or not matrices or matrices[0] in given:
        return {}
    path, last = matrices[0], convolutions[-1]
    rows = kernels[path][0]
    if rows == last:
        return {}
    fitting = {each for each in convolutions if rows % each == 0}
    if fitting == {last}:
        return {path: last}
    raise TorchError(
        f"{path} has {rows} rows, and the names do not tell which feature map reaches "
        "it flattened: PyTorch and Flax flatten in different orders. Expected "
        "calls=trace(model, images, train=False); or the channels of that map, "
        f"channels={{{path!r}: {last}}}, None where none is flattened."
    )


def _layer(path: str, call: Call, arrays: Sequence[Any]) -> Layer:
    has_kernel = any(where[-1] == "kernel" for where, _ in arrays)
    leaves = []
    for where, shape in arrays:
        name = str(where[-1])
        layout = _kernel_layout(call.kind, len(shape)) if name == "kernel" else Layout()
        # Of a matrix its rows; of a normalization of flattened features all it has.
        rows = len(shape) == 2 if has_kernel else name in NAMES and name != "embedding"
        if call.channels and rows and len(shape) <= 2:
            if shape[0] % call.channels:
                raise TorchError(
                    f"channels: {path} has {shape[0]} rows, which is no multiple of "
                    f"{call.channels}; expected the channels of the feature map that "
                    "reaches it flattened, or None where none does."
                )
            layout = dataclasses.replace(layout, channels=call.channels)
        leaves.append(Leaf(where, shape, NAMES.get(name, ""), layout))
    return Layer(path, tuple(leaves))


def _kernel_layout(kind: str, rank: int) -> Layout:
    pixels = range(2, rank)
    if kind == "transposed" and pixels:
        return Layout((*pixels, 0, 1), flipped=len(pixels))
    return Layout((*pixels, 1, 0))
