"""Weights and running statistics from PyTorch to Flax models, and back.

A mapping says which layer of PyTorch is which of ours; nothing is guessed. A kernel is
laid out (height, width, in, out) here and (out, in, height, width) there; a feature map
that is flattened comes in the order (height, width, channels) here and (channels,
height, width) there.
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax._validate import did_you_mean, first_line


class TorchError(ValueError):
    """Weights of PyTorch that cannot be read, or that do not fit a network."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of ours, and how its arrays differ from PyTorch's.

    Args:
        path: in the variables, without the collection: "stage1_block1/conv1/conv".
        channels: of the feature map that reaches the layer flattened; 1 where none
            does; None where that is plain.
        transposed: it is `flax.linen.ConvTranspose`, whose kernel runs backward;
            False with transpose_kernel=True.
        subtract: the tensor is the bias of the layer before this normalization, which
            has none here: it is subtracted from the running mean, and written as 0.
    """

    path: str
    channels: int | None = None
    transposed: bool = False
    subtract: bool = False


LayerMapping = Mapping[str, str | Layer | None]
"""Names of PyTorch to paths of ours; of several patterns that fit, the first counts.

A name is that of a layer or of one tensor, a value a path, a `Layer`, or None for what
goes nowhere. "{i}" stands for a number, "{i+1}" for the next, and "*" for any path.
"""

SAME_NAMES: LayerMapping = {"*": "*"}
"""The mapping of a PyTorch model whose layers are called as ours."""

RESNET: LayerMapping = {
    "conv1": "conv1/conv",
    "bn1": "conv1/bn",
    "layer{i}.{j}.conv{k}": "stage{i}_block{j+1}/conv{k}/conv",
    "layer{i}.{j}.bn{k}": "stage{i}_block{j+1}/conv{k}/bn",
    "layer{i}.{j}.downsample.0": "stage{i}_block{j+1}/projection/conv",
    "layer{i}.{j}.downsample.1": "stage{i}_block{j+1}/projection/bn",
    "fc": "logits",
    **SAME_NAMES,
}
"""The mapping of torchvision's and timm's residual networks."""


def known_mapping(model: str, image_shape: tuple[int, ...] = ()) -> LayerMapping | None:
    """Return the mapping of a network of `bnjax.models`, None for any other.

    Residual networks are called as in torchvision and timm, or as here; the others as
    here.

    Args:
        model: a name of `bnjax.models.MODELS`.
        image_shape: (height, width) or (height, width, channels), which "mlp" flattens.

    Example:
        >>> known_mapping("resnet50")["layer{i}.{j}.bn{k}"]
        'stage{i}_block{j+1}/conv{k}/bn'
        >>> known_mapping("lenet")["dense1"].channels
        16
    """
    if model == "mlp":
        channels = image_shape[2] if len(image_shape) == 3 else 1
        return {"dense_0": Layer("dense_0", channels=channels), **SAME_NAMES}
    if model == "lenet":
        return {"dense1": Layer("dense1", channels=16), **SAME_NAMES}
    if model == "inception":
        return {"logits": Layer("logits", channels=1), **SAME_NAMES}
    return RESNET if model.startswith("resnet") else None


COUNTER = "num_batches_tracked"
COLLECTIONS = ("params", "batch_stats")
NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
"""What an array of Flax is called in PyTorch."""


class Layout(NamedTuple):
    """How an array of PyTorch becomes one of Flax.

    Args:
        axes: its axes in Flax's order.
        flipped: how many of the first axes then run backward.
        channels: of the feature map whose flattened entries the first axis then is.
    """

    axes: tuple[int, ...]
    flipped: int = 0
    channels: int = 1

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Return PyTorch's array in Flax's layout.

        Example:
            >>> Layout((1, 0), channels=2).from_torch(np.arange(6)[None]).ravel()
            array([0, 3, 1, 4, 2, 5])
        """
        array = np.flip(array.transpose(self.axes), range(self.flipped))
        return _swap_rows(array, self.channels)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return Flax's array in PyTorch's layout."""
        if self.channels > 1:
            array = _swap_rows(array, array.shape[0] // self.channels)
        return np.flip(array, range(self.flipped)).transpose(np.argsort(self.axes))


def _swap_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Transpose the matrix of so many rows that the first axis stands for."""
    if rows == 1:
        return array
    matrix = array.reshape(rows, -1, *array.shape[1:])
    return matrix.swapaxes(0, 1).reshape(array.shape)


class Leaf(NamedTuple):
    """An array of ours: its path, shape, layer, and whether the layer has a kernel."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    layer: str
    has_kernel: bool

    def __str__(self) -> str:
        return "/".join(map(str, self.path))

    def layout(self, layer: Layer) -> Layout:
        """Return how a tensor becomes this array."""
        rank, name = len(self.shape), self.path[-1]
        axes, flipped = tuple(range(rank)), 0
        if name == "kernel" and layer.transposed and rank > 2:
            axes, flipped = (*range(2, rank), 0, 1), rank - 2
        elif name == "kernel":
            axes = (*range(2, rank), 1, 0)
        # Of a matrix its rows; of a normalization of flattened features all it has.
        flat = (name == "kernel" and rank == 2) if self.has_kernel else rank == 1
        channels = (layer.channels if flat else None) or 1
        if channels > 1 and self.shape[0] % channels:
            raise TorchError(
                f"channels: {self} has {self.shape[0]} rows, which is no multiple of "
                f"{channels}; expected the channels of the feature map that reaches "
                "it flattened, 1 where none does."
            )
        return Layout(axes, flipped, channels)


class Pair(NamedTuple):
    """A tensor, and the array of ours that it becomes or is subtracted from."""

    name: str
    leaf: Leaf
    layer: Layer

    @property
    def layout(self) -> Layout:
        """How the tensor becomes the array."""
        return self.leaf.layout(self.layer)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.leaf.shape[i] for i in np.argsort(self.layout.axes))


def pair_arrays(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    mapping: LayerMapping = SAME_NAMES,
    *,
    keep: Sequence[str] = (),
) -> list[Pair]:
    """Return which tensor of a state dict is which array of a model.

    Args:
        state: as of `from_torch`; shapes are enough.
        variables: likewise.
        mapping: likewise.
        keep: likewise.

    Raises:
        TorchError: as `from_torch`.

    Example:
        >>> variables = {"params": {"logits": {"kernel": np.ones((2, 3))}}}
        >>> for pair in pair_arrays({"fc.weight": np.ones((3, 2))}, variables, RESNET):
        ...     print(pair.name, pair.leaf, pair.layout.axes)
        fc.weight params/logits/kernel (1, 0)
    """
    if not state:
        raise TorchError("the state dict is empty; expected tensors by name.")
    ours = _leaves(variables)
    kept = _kept(ours, keep)
    names = {*state, *(name.rpartition(".")[0] for name in state)}
    for pattern, given in mapping.items():
        if given is None and not any(map(_regex(pattern).fullmatch, names)):
            raise TorchError(
                f"mapping: no tensor or layer is {pattern!r}, which is to go nowhere."
                f"{did_you_mean(pattern, names)}"
            )
    pairs: list[Pair] = []
    problems: list[str] = []
    sources: dict[tuple[Leaf, bool], str] = {}
    for name in state:
        found = _find(name, mapping)
        if name.rpartition(".")[2] == COUNTER or found is None:
            continue
        layer, last = found
        leaf, shape = ours.get((layer.path, last)), tuple(np.shape(state[name]))
        if leaf is None or leaf in kept:
            why = (
                f"{leaf} keeps its value" if leaf else _missing(layer, last, name, ours)
            )
            problems.append(f"no place for {name} {shape}: {why}")
            continue
        pair = Pair(name, leaf, layer)
        if shape != pair.torch_shape:
            problems.append(
                f"{name} {shape} for {leaf}, which needs {pair.torch_shape}"
            )
        if (other := sources.setdefault((leaf, layer.subtract), name)) != name:
            problems.append(f"{name} and {other} are both for {leaf}")
        pairs.append(pair)
    for leaf in ours.values():
        if leaf not in kept and (leaf, False) not in sources:
            shape = Pair("", leaf, Layer("")).torch_shape
            problems.append(f"nothing for {leaf}, which needs {shape}")
    if problems:
        raise _misfit(problems)
    _check_flattened(pairs, ours)
    return pairs


def from_torch(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    mapping: LayerMapping = SAME_NAMES,
    *,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a model's variables with the values of a state dict of PyTorch.

    `num_batches_tracked` has no counterpart and is left out.

    Args:
        state: arrays or tensors by name: of `read_state_dict`, or a `state_dict()`.
        variables: of the model, the collections "params" and "batch_stats" of linen or
            the tree of `nnx.to_pure_dict`; `jax.ShapeDtypeStruct` will do for arrays.
        mapping: which layer is which; `known_mapping` has those of `bnjax.models`.
        keep: layers, blocks, arrays or collections of ours that keep their values.

    Returns:
        Variables of the same structure and dtypes. What was given stays as it was.

    Raises:
        TorchError: a tensor is missing, has no place or is of another shape, and all
            are named; or what is flattened before a layer cannot be told.

    Example:
        >>> from flax import linen as nn
        >>> variables = nn.Dense(1).init(jax.random.key(0), jnp.ones((1, 2)))
        >>> state = {"fc.weight": np.array([[1.0, 2.0]]), "fc.bias": np.array([3.0])}
        >>> from_torch(state, variables, {"fc": ""})["params"]["kernel"].tolist()
        [[1.0], [2.0]]
    """
    pairs = pair_arrays(state, variables, mapping, keep=keep)
    found: dict[Any, Any] = dict(
        flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
    )
    values: dict[Any, np.ndarray] = {}
    for pair in sorted(pairs, key=lambda pair: pair.layer.subtract):
        tensor = as_array(state[pair.name], pair.name)
        if not jnp.issubdtype(tensor.dtype, np.floating):
            raise TorchError(f"{pair.name} is {tensor.dtype}, not floating.")
        path, value = pair.leaf.path, pair.layout.from_torch(tensor)
        if pair.layer.subtract:
            value = np.subtract(values[path], value, dtype=np.float64)
        values[path] = value
    found |= {path: jnp.asarray(v, found[path].dtype) for path, v in values.items()}
    return unflatten_dict(found)


def to_torch(
    variables: Mapping[str, Any],
    mapping: LayerMapping = SAME_NAMES,
    *,
    num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
    """Return a state dict of PyTorch with the values of a model's variables.

    Args:
        variables: of the model, as `from_torch` gives them.
        mapping: as of `from_torch`; by default the names are the model's own.
        num_batches_tracked: what every BN layer is told of the past; PyTorch reads it
            only where momentum=None.

    Returns:
        Arrays by name, for `write_state_dict`.

    Raises:
        TorchError: the mapping has no name for an array, or what is flattened before a
            layer cannot be told.

    Example:
        >>> from bnjax.linen import BatchNorm
        >>> layer = BatchNorm(use_running_average=True)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> sorted(to_torch(variables))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    ours = _leaves(variables)
    pairs = [pair for key, leaf in ours.items() for pair in _named(key, leaf, mapping)]
    named = {pair.leaf for pair in pairs}
    missing = [f"{leaf} has no name" for leaf in ours.values() if leaf not in named]
    if missing:
        raise _misfit(missing)
    _check_flattened(pairs, ours)
    values = flatten_dict(unfreeze(dict(variables)))
    state = {}
    for pair in pairs:
        value = pair.layout.to_torch(np.asarray(values[pair.leaf.path]))
        value = np.zeros_like(value) if pair.layer.subtract else value
        state[pair.name] = np.asarray(value, order="C")
        layer, _, last = pair.name.rpartition(".")
        if last == "running_mean":
            counter = ".".join(filter(None, (layer, COUNTER)))
            state[counter] = np.asarray(num_batches_tracked, np.int64)
    return state


def _leaves(variables: Mapping[str, Any]) -> dict[tuple[str, str], Leaf]:
    """Return the arrays by the path of their layer and PyTorch's name; "" for none."""
    variables = unfreeze(dict(variables))
    trees = {each: variables[each] for each in COLLECTIONS if each in variables}
    arrays = flatten_dict(trees or variables)
    first = 1 if trees else 0
    kernels = {path[first:-1] for path in arrays if path[-1] == "kernel"}
    found: dict[tuple[str, str], Leaf] = {}
    for path, value in arrays.items():
        if value is None:
            continue
        whole = "/".join(map(str, path[first:]))
        layer = "/".join(map(str, path[first:-1]))
        key = (layer, NAMES[path[-1]]) if path[-1] in NAMES else (whole, "")
        key = (whole, "") if key in found else key
        kernel = path[first:-1] in kernels
        found[key] = Leaf(path, tuple(np.shape(value)), key[0], kernel)
    return found


_FIELD = re.compile(r"\{([a-z]+)([+-]\d+)?\}|\*")


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    parts, end = [], 0
    for field in _FIELD.finditer(pattern):
        parts.append(re.escape(pattern[end : field.start()]))
        parts.append(f"(?P<{field[1]}>\\d+)" if field[1] else "(?P<REST>.*)")
        end = field.end()
    parts.append(re.escape(pattern[end:]))
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise TorchError(
            f"mapping: {pattern!r} has a field twice; expected each of {{i}}, {{j}} "
            "... and * once."
        ) from error


def _translate(path: str, source: str, target: str, *separators: str) -> str | None:
    """Return the path as the pattern `target` has it, None if it is not `source`'s.

    Example:
        >>> _translate("a1.2", "a{i}.{j}", "a{i}/b{j+1}", ".", "/")
        'a1/b3'
    """
    found = _regex(source).fullmatch(path)
    if found is None:
        return None
    numbers = {
        field[1]: int(found[field[1]]) - int(field[2] or 0)
        for field in _FIELD.finditer(source)
        if field[1]
    }

    def fill(field: re.Match[str]) -> str:
        if not field[1] and "REST" in found.groupdict():
            return found["REST"].replace(*separators)
        if field[1] in numbers:
            return str(numbers[field[1]] + int(field[2] or 0))
        raise TorchError(
            f"mapping: {field[0]} of {target!r} is not in {source!r}; expected the "
            "same fields on both sides."
        )

    return _FIELD.sub(fill, target)


def _as_layer(given: str | Layer | None) -> Layer:
    return given if isinstance(given, Layer) else Layer(given or "")


def _find(name: str, mapping: LayerMapping) -> tuple[Layer, str] | None:
    """Return our layer for a tensor and the tensor's name in it; None if it has none.

    A tensor that no pattern fits is one of our layer of the same name, which is not.
    """
    layer, _, last = name.rpartition(".")
    for pattern, given in mapping.items():
        target = _as_layer(given)
        goal = "" if given is None else target.path
        choices = (
            [(layer, last), (name, "")] if last in NAMES.values() else [(name, "")]
        )
        for path, inner in choices:
            if (ours := _translate(path, pattern, goal, ".", "/")) is not None:
                last = "running_mean" if target.subtract else inner
                found = dataclasses.replace(target, path=ours)
                return None if given is None else (found, last)
    return Layer(name.replace(".", "/")), ""


def _named(key: tuple[str, str], leaf: Leaf, mapping: LayerMapping) -> Iterator[Pair]:
    """Yield the tensors of PyTorch that an array of ours is written as."""
    path, last = key
    done = False
    for pattern, given in mapping.items():
        target = _as_layer(given)
        if given is None or (last != "running_mean" if target.subtract else done):
            continue
        name = _translate(path, target.path, pattern, "/", ".")
        if name is None:
            continue
        if not target.subtract:
            name, done = ".".join(filter(None, (name, last))), True
        yield Pair(name, leaf, target)


def _kept(ours: Mapping[Any, Leaf], keep: Sequence[str]) -> set[Leaf]:
    kept: set[Leaf] = set()
    for prefix in keep:
        found = {
            leaf
            for leaf in ours.values()
            for path in (str(leaf), f"{leaf.layer}/{leaf.path[-1]}")
            if f"{path}/".startswith(f"{prefix}/")
        }
        if not found:
            raise TorchError(
                f"keep: there is no {prefix!r}.{_hint(prefix, ours)} Expected a layer "
                "or an array of ours, or the start of its path."
            )
        kept |= found
    return kept


def _check_flattened(pairs: Sequence[Pair], ours: Mapping[Any, Leaf]) -> None:
    """Refuse a matrix of which it is not told whether a flattened map reaches it.

    PyTorch and Flax flatten in different orders, and no shape shows which. A matrix is
    plain if a layer gives as many features as it has rows.
    """
    kernels = [leaf.shape for leaf in ours.values() if leaf.path[-1] == "kernel"]
    if all(len(shape) < 3 for shape in kernels):
        return
    widths = {shape[-1] for shape in kernels}
    widths |= {shape[-2] for shape in kernels if len(shape) > 2}
    for pair in pairs:
        leaf, rows = pair.leaf, pair.leaf.shape[:1]
        matrix = leaf.path[-1] == "kernel" and len(leaf.shape) == 2
        if matrix and pair.layer.channels is None and widths.isdisjoint(rows):
            name = pair.name.rpartition(".")[0]
            raise TorchError(
                f"{leaf} has {rows[0]} rows, and no layer gives as many: it is not "
                "told which feature map reaches it flattened, and PyTorch and Flax "
                "flatten in different orders. Expected the channels of that map in the "
                f"mapping, {name!r}: Layer({leaf.layer!r}, channels=...); 1 where none "
                "is flattened."
            )


SHOWN = 40
"""How many problems a message names."""


def _misfit(problems: Sequence[str]) -> TorchError:
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return TorchError(
        "the state dict does not fit the network:\n  "
        + "\n  ".join(problems[:SHOWN])
        + more
        + "\nBuild the same network; or say in the mapping where a layer of PyTorch "
        "goes (None: nowhere), and with keep which arrays of ours keep their values."
    )


def _missing(layer: Layer, last: str, name: str, ours: Mapping[Any, Leaf]) -> str:
    """Say why a tensor has no place."""
    if not any(leaf.layer == layer.path for leaf in ours.values()):
        return f"there is no {layer.path!r} here.{_hint(layer.path, ours)}"
    advice = (
        f". If a normalization alone follows it, {name!r}: Layer(<its path>, "
        "subtract=True) in the mapping takes it into the mean"
    )
    return f"our {layer.path} has no {last}{advice if last == 'bias' else ''}"


def _hint(given: str, ours: Mapping[Any, Leaf]) -> str:
    starts = {leaf.layer.rsplit("/", n)[0] for leaf in ours.values() for n in range(3)}
    return did_you_mean(given, starts)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Return the layers of a linen model in the order of their first calls.

    The model is called on shapes alone.

    Args:
        model: of any kind.
        *args: what it is called with: arrays or `jax.ShapeDtypeStruct`; the first are
            the images.
        **kwargs: likewise, such as train=False.

    Example:
        >>> from bnjax.models import LeNet
        >>> layers = trace(LeNet(), jnp.zeros((1, 28, 28, 1)), train=False)
        >>> [layer for layer in layers if layer.channels]
        [Layer(path='dense1', channels=16, transposed=False, subtract=False)]
    """
    layers: dict[str, Layer] = {}
    channels: int | None = args[0].shape[-1] if args[0].ndim > 3 else None
    convolved = channels is not None

    def record(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        nonlocal channels, convolved
        module = context.module
        convolution = isinstance(module, nn.Conv | nn.ConvTranspose)
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
        convolved |= convolution
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
) -> dict[str, str | Layer | None]:
    """Propose which layer is which, for a person to look at and confirm.

    Layers whose arrays have the same shapes in PyTorch's layout are paired; where
    several have, the first of one is the first of the other, a block's shortcut being
    taken for its last layer. What has no counterpart is left out.

    Args:
        state: arrays or tensors by name; shapes are enough.
        variables: of the model; see `from_torch`.
        layers: of the model, as `trace` gives them. Without them the order is that of
            the names, and what is flattened before a layer is not known.

    Returns:
        A mapping, which `format_mapping` prints.

    Example:
        >>> variables = {"params": {"conv": {"kernel": np.ones((3, 3, 1, 8))}}}
        >>> propose_mapping({"0.weight": np.ones((8, 1, 3, 3))}, variables)
        {'0': 'conv'}
    """
    called = {layer.path: layer for layer in layers}
    theirs: dict[str, set[Any]] = {}
    for name in sorted(state, key=natural) if list(state) == sorted(state) else state:
        layer, _, last = name.rpartition(".")
        layer, last = (layer, last) if last in NAMES.values() else (name, "")
        if not name.endswith(COUNTER):
            theirs.setdefault(layer, set()).add((last, tuple(np.shape(state[name]))))
    ours: dict[str, set[Any]] = {}
    for (path, last), leaf in _leaves(variables).items():
        back = path in called and called[path].transposed
        shape = Pair("", leaf, Layer(path, transposed=back)).torch_shape
        ours.setdefault(path, set()).add((last, shape))
    order = {path: i for i, path in enumerate(called)}
    paths = sorted(ours, key=lambda path: (order.get(path, len(order)), natural(path)))
    waiting: dict[Any, list[str]] = {}
    for path in shortcuts_last(paths, "/"):
        waiting.setdefault(frozenset(ours[path]), []).append(path)
    found: dict[str, str | Layer | None] = {}
    for layer in shortcuts_last(list(theirs), "."):
        shapes = frozenset(theirs[layer])
        # A bias too many is left to be told what it is.
        weight = frozenset(each for each in shapes if each[0] == "weight")
        for queue in (waiting.get(shapes), len(shapes) == 2 and waiting.get(weight)):
            if queue and layer not in found:
                path = queue.pop(0)
                known = called.get(path, Layer(path))
                found[layer] = path if known == Layer(path) else known
    return {layer: found[layer] for layer in theirs if layer in found}


SHORTCUTS = ("downsample", "shortcut", "projection", "proj", "skip")


def shortcuts_last(paths: Sequence[str], separator: str) -> list[str]:
    """Return paths with the shortcut of a block behind the rest of the block.

    PyTorch's models define it last, where others call it first.

    Example:
        >>> shortcuts_last(["block1/skip/conv", "block1/conv1", "block2/conv1"], "/")
        ['block1/conv1', 'block1/skip/conv', 'block2/conv1']
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


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts "layer.10" after "layer.2".

    Example:
        >>> sorted(["layer.10", "layer.2", "fc"], key=natural)
        ['fc', 'layer.2', 'layer.10']
    """
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def format_mapping(mapping: LayerMapping) -> str:
    """Return a mapping as JSON, a line a layer, as `read_mapping` reads it.

    Example:
        >>> print(
        ...     format_mapping({"fc1": Layer("dense1", channels=16), "fc2": "dense2"})
        ... )
        {
          "fc1": {"path": "dense1", "channels": 16},
          "fc2": "dense2"
        }
    """
    lines = []
    for name, given in mapping.items():
        value = given
        if isinstance(given, Layer):
            value = {k: v for k, v in dataclasses.asdict(given).items() if v}
        lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def read_mapping(path: Path | str) -> dict[str, str | Layer | None]:
    """Read a mapping from a JSON file: paths, arguments of `Layer`, or null.

    Raises:
        TorchError: the file is not there, or holds something else.
    """
    mapping: dict[str, str | Layer | None] = {}
    name = "it"
    try:
        for name, value in json.loads(Path(path).read_text(encoding="utf-8")).items():
            mapping[name] = Layer(**value) if isinstance(value, dict) else value
            layer = _as_layer(mapping[name])
            if not isinstance(layer.path, str) or type(layer.channels or 1) is not int:
                raise TypeError(f"{value!r}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TorchError(
            f"{path} is no mapping: of {name}, {first_line(error)}. Expected JSON such "
            'as {"fc1": {"path": "dense1", "channels": 16}, "fc2": "dense2"}.'
        ) from error
    return mapping


def as_array(value: Any, name: str = "the tensor") -> np.ndarray:
    """Return an array of what may be a tensor of PyTorch, with its dtype.

    Raises:
        TorchError: the tensor is sparse, quantized or otherwise no array.
    """
    if not hasattr(value, "detach"):
        return np.asarray(value)
    try:
        tensor = value.detach().cpu()
        if str(tensor.dtype) != "torch.bfloat16":
            return tensor.numpy()
        torch = sys.modules["torch"]
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    except (RuntimeError, TypeError) as error:
        raise TorchError(
            f"{name} is no plain tensor: {first_line(error)} Expected a dense one of "
            "numbers: save it as such in PyTorch."
        ) from error


def batch_norm_options(
    momentum: float | None = 0.1, eps: float = 1e-5, *, affine: bool = True
) -> dict[str, Any]:
    r"""Return what makes `bnjax.linen.BatchNorm` do as torch.nn.BatchNorm.

    .. math:: \mathrm{momentum} = 1 - \mathrm{momentum}_\mathrm{PyTorch}

    Args:
        momentum: of the layer in PyTorch, the weight of the new statistics.
        eps: of the layer in PyTorch.
        affine: of the layer in PyTorch.

    Returns:
        momentum, epsilon, unbiased, use_scale and use_bias.

    Raises:
        TorchError: momentum is None.

    Example:
        >>> batch_norm_options(0.1)["momentum"], torch_batch_norm_options(0.9)
        (0.9, {'momentum': 0.1, 'eps': 1e-05})
        >>> from bnjax.linen import BatchNorm
        >>> BatchNorm(use_running_average=True, **batch_norm_options(0.3)).unbiased
        True
    """
    if momentum is None:
        raise TorchError(
            "momentum=None, the plain mean over all batches, has no counterpart; "
            "expected a number. Take one, such as 0.1, and estimate the statistics "
            "again after training, with bnjax.population.recompute_batch_stats."
        )
    return {
        "momentum": _complement(momentum),
        "epsilon": eps,
        "unbiased": True,
        "use_scale": affine,
        "use_bias": affine,
    }


def torch_batch_norm_options(
    momentum: float = 0.99, epsilon: float = 1e-5
) -> dict[str, float]:
    """Return what makes torch.nn.BatchNorm do as `bnjax.linen.BatchNorm`.

    PyTorch keeps the unbiased variance, as with unbiased=True here.

    Args:
        momentum: of the layer here, the weight of the old statistics.
        epsilon: of the layer here.

    Returns:
        momentum and eps.

    Example:
        >>> torch_batch_norm_options()
        {'momentum': 0.01, 'eps': 1e-05}
    """
    return {"momentum": _complement(momentum), "eps": epsilon}


def _complement(momentum: float) -> float:
    # Without the digits that 1 - 0.9 leaves.
    return round(1 - momentum, 12)
