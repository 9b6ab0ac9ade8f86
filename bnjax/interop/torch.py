"""Convert weights and running statistics from PyTorch to Flax models, and back.

A mapping says which PyTorch layer belongs to which Flax layer; the functions do not
guess. Flax lays out a kernel as (height, width, in, out), PyTorch as (out, in, height,
width). Flax flattens a feature map in the order (height, width, channels), PyTorch in
the order (channels, height, width).
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax._validate import did_you_mean, first_line

__all__ = [
    "RESNET",
    "Layer",
    "LayerMapping",
    "TorchError",
    "batch_norm_options",
    "from_torch",
    "known_mapping",
    "to_torch",
    "torch_batch_norm_options",
]


class TorchError(ValueError):
    """PyTorch weights cannot be read, or do not fit a network."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A Flax layer, and how its arrays differ from PyTorch's.

    Attributes:
        path: the path in the variables, without the collection, such as
            "stage1_block1/conv1/conv".
        channels: if the input of the layer is a flattened feature map, the number of
            channels of that map; 1 if it is not; None if the shapes already show it.
        transposed: whether the layer is a `flax.linen.ConvTranspose`, whose kernel is
            reversed. With transpose_kernel=True it is False.
        subtract: whether the tensor is the bias of the layer before this normalization,
            and that layer has no bias in Flax. Import subtracts the bias from the
            running mean, and export writes 0.
    """

    path: str
    channels: int | None = None
    transposed: bool = False
    subtract: bool = False


LayerMapping = Mapping[str, str | Layer | None]
"""A mapping from PyTorch names to Flax paths; the first matching pattern counts.

A key is the name of a layer or of one tensor. A value is a path, a `Layer`, or None if
the tensors are not used. "{i}" matches a number, "{i+1}" the next number, "*" any path.
"""

SAME_NAMES: LayerMapping = {"*": "*"}
"""The mapping of a PyTorch model whose layers have the names of the Flax layers."""

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
    """Return the mapping of a network of `bnjax.models`, or None for another network.

    The layers of residual networks have the names of torchvision and timm, or those of
    `bnjax.models`. The layers of the other networks have the names of `bnjax.models`.

    Args:
        model: a name of `bnjax.models.MODELS`.
        image_shape: (height, width) or (height, width, channels), which "mlp" flattens.

    Returns:
        The mapping, or None.
    """
    channels = image_shape[2] if len(image_shape) == 3 else 1
    first = {"mlp": ("dense_0", channels), "lenet": ("dense1", 16)}
    first["inception"] = ("logits", 1)
    if model in first:
        layer, channels = first[model]
        return {layer: Layer(layer, channels=channels), **SAME_NAMES}
    return RESNET if re.fullmatch(r"resnet\d+", model) else None


def prefer(first: LayerMapping, others: LayerMapping) -> LayerMapping:
    """Join two mappings; if they disagree, `first` counts.

    The patterns of `first` come first, because the first matching pattern counts. Its
    values also replace the values of patterns that are in both.

    Examples:
        >>> prefer({"fc": "logits", "bn": None}, {"*": "*", "bn": "norm"})
        {'fc': 'logits', 'bn': None, '*': '*'}
    """
    return {**first, **others, **first}


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
"""PyTorch's name for each Flax array."""
TENSORS = frozenset(NAMES.values())


class Leaf(NamedTuple):
    """A Flax array: its path, shape, layer, and whether the layer has a kernel."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    layer: str
    has_kernel: bool

    def __str__(self) -> str:
        return "/".join(map(str, self.path))


class Pair:
    """A PyTorch tensor, and the Flax array that it becomes or is subtracted from."""

    def __init__(self, name: str, leaf: Leaf, layer: Layer) -> None:
        self.name, self.leaf, self.layer = name, leaf, layer
        rank, last = len(leaf.shape), leaf.path[-1]
        # The tensor's axes in Flax's order; the axes in _backward are also reversed.
        self._axes, self._backward = tuple(range(rank)), ()
        if last == "kernel" and layer.transposed and rank > 2:
            self._axes = (*range(2, rank), 0, 1)
            self._backward = tuple(range(rank - 2))
        elif last == "kernel":
            self._axes = (*range(2, rank), 1, 0)
        # Flattening permutes the rows of a matrix, or all arrays of a normalization.
        flat = (last == "kernel" and rank == 2) if leaf.has_kernel else rank == 1
        self._channels = (layer.channels if flat else None) or 1
        if flat and leaf.shape[0] % self._channels:
            raise TorchError(
                f"channels: {leaf} has {leaf.shape[0]} rows, which is no multiple of "
                f"{self._channels}; expected the number of channels of the feature "
                "map that reaches it flattened, or 1 if its input is not flattened."
            )
        self.torch_shape = tuple(leaf.shape[i] for i in np.argsort(self._axes))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """Return PyTorch's array in Flax's layout."""
        array = np.flip(tensor.transpose(self._axes), self._backward)
        return _swap_rows(array, self._channels)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return Flax's array in PyTorch's layout."""
        if self._channels > 1:
            array = _swap_rows(array, array.shape[0] // self._channels)
        return np.flip(array, self._backward).transpose(np.argsort(self._axes))


def _swap_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Read the first axis as a matrix with this number of rows, and transpose it."""
    if rows == 1:
        return array
    matrix = array.reshape(rows, -1, *array.shape[1:])
    return matrix.swapaxes(0, 1).reshape(array.shape)


def from_torch(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    mapping: LayerMapping = SAME_NAMES,
    *,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a model's variables with the values of a PyTorch state dict.

    The structure and the dtypes are those of the model. `num_batches_tracked` is
    ignored.

    Args:
        state: arrays or tensors by name, from `read_state_dict` or `state_dict()`.
        variables: the variables of the model: the collections "params" and
            "batch_stats" of linen, or the tree of `nnx.to_pure_dict`. The leaves may be
            a `jax.ShapeDtypeStruct`.
        mapping: which PyTorch layer belongs to which Flax layer; `known_mapping` has
            the mappings of `bnjax.models`.
        keep: the Flax layers, blocks, arrays or collections that keep their values.

    Returns:
        The new variables.

    Raises:
        TorchError: if the tensors do not fit the variables.

    Examples:
        >>> import jax
        >>> from flax import linen as nn
        >>> variables = nn.Dense(1).init(jax.random.key(0), jnp.ones((1, 2)))
        >>> state = {"fc.weight": np.array([[1.0, 2.0]]), "fc.bias": np.array([3.0])}
        >>> from_torch(state, variables, {"fc": ""})["params"]["kernel"].tolist()
        [[1.0], [2.0]]
    """
    pairs = pair_arrays(state, variables, mapping, keep=keep)
    tree = unfreeze(dict(variables))
    arrays: dict[Any, Any] = dict(flatten_dict(tree, keep_empty_nodes=True))
    values: dict[Any, np.ndarray] = {}
    for pair in sorted(pairs, key=lambda pair: pair.layer.subtract):
        tensor = as_array(state[pair.name], pair.name)
        if not jnp.issubdtype(tensor.dtype, np.floating):
            raise TorchError(f"{pair.name} is {tensor.dtype}, not floating.")
        path, value = pair.leaf.path, pair.from_torch(tensor)
        if pair.layer.subtract:
            value = np.subtract(values[path], value, dtype=np.float64)
        values[path] = value
    new = {path: jnp.asarray(v, arrays[path].dtype) for path, v in values.items()}
    return unflatten_dict(arrays | new)


def to_torch(
    variables: Mapping[str, Any],
    mapping: LayerMapping = SAME_NAMES,
    *,
    num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
    """Return a PyTorch state dict of NumPy arrays with the values of a model.

    Args:
        variables: the variables of the model, as for `from_torch`.
        mapping: as in `from_torch`. By default, PyTorch's names are the Flax names.
        num_batches_tracked: the number of past batches of every BN layer; PyTorch
            reads it only if momentum=None.

    Returns:
        Arrays by PyTorch's names, for `load_state_dict`.

    Raises:
        TorchError: if an array has no PyTorch name.

    Examples:
        >>> import jax
        >>> from bnjax.linen import BatchNorm
        >>> layer = BatchNorm(use_running_average=True)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> sorted(to_torch(variables))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    ours = leaves_of(variables)
    named = {leaf: list(_named(key, leaf, mapping)) for key, leaf in ours.items()}
    pairs = [pair for each in named.values() for pair in each]
    _check_fit([f"{leaf} has no name" for leaf in named if not named[leaf]])
    _check_flattened(pairs, ours)
    arrays = flatten_dict(unfreeze(dict(variables)))
    state = {}
    for pair in pairs:
        value = pair.to_torch(np.asarray(arrays[pair.leaf.path]))
        value = np.zeros_like(value) if pair.layer.subtract else value
        state[pair.name] = np.asarray(value, order="C")
        layer, dot, last = pair.name.rpartition(".")
        if last == "running_mean":
            state[layer + dot + COUNTER] = np.asarray(num_batches_tracked, np.int64)
    return state


def pair_arrays(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    mapping: LayerMapping = SAME_NAMES,
    *,
    keep: Sequence[str] = (),
) -> list[Pair]:
    """Pair each tensor with its Flax array, as `from_torch` does; shapes are enough."""
    if not state:
        raise TorchError("the state dict is empty; expected tensors by name.")
    ours = leaves_of(variables)
    kept = _kept(ours, keep)
    known = {*state, *(name.rpartition(".")[0] for name in state)}
    for pattern, given in mapping.items():
        if given is None and not any(map(_regex(pattern).fullmatch, known)):
            raise TorchError(
                f"mapping: no tensor or layer is {pattern!r}, which is mapped to None."
                f"{did_you_mean(pattern, known)}"
            )
    pairs: list[Pair] = []
    problems: list[str] = []
    sources: dict[Any, str] = {}
    for name in state:
        layer, last = find(name, mapping) or (Layer(name.replace(".", "/")), "")
        if layer is None or name.rpartition(".")[2] == COUNTER:
            continue
        leaf, shape = ours.get((layer.path, last)), tuple(np.shape(state[name]))
        if leaf is None or leaf in kept:
            missing = "" if leaf else _missing(layer, last, name, ours)
            why = missing or f"{leaf} keeps its value"
            problems.append(f"no place for {name} {shape}: {why}")
            continue
        pair = Pair(name, leaf, layer)
        needed = pair.torch_shape
        if shape != needed:
            problems.append(f"{name} {shape} for {leaf}, which needs {needed}")
        other = sources.setdefault((leaf, layer.subtract), name)
        if other != name:
            problems.append(f"{other} and {name} are both for {leaf}")
        pairs.append(pair)
    for leaf in ours.values():
        if leaf not in kept and (leaf, False) not in sources:
            shape = Pair("", leaf, Layer("")).torch_shape
            problems.append(f"nothing for {leaf}, which needs {shape}")
    _check_fit(problems)
    _check_flattened(pairs, ours)
    return pairs


def leaves_of(variables: Mapping[str, Any]) -> dict[tuple[str, str], Leaf]:
    """Return the arrays by the path of their layer and PyTorch's name, or ""."""
    variables = unfreeze(dict(variables))
    trees = {each: variables[each] for each in COLLECTIONS if each in variables}
    arrays: dict[Any, Any] = dict(flatten_dict(trees or variables))
    first = 1 if trees else 0
    kernels = {path[first:-1] for path in arrays if path[-1] == "kernel"}
    found: dict[tuple[str, str], Leaf] = {}
    for path, value in arrays.items():
        if value is None:
            continue
        *layer, last = map(str, path[first:])
        key = "/".join(layer), NAMES.get(last, "")
        if not key[1] or key in found:
            key = "/".join((*layer, last)), ""
        has_kernel = path[first:-1] in kernels
        found[key] = Leaf(path, tuple(np.shape(value)), key[0], has_kernel)
    return found


_FIELD = re.compile(r"\{([a-z]+)([+-]\d+)?\}|\*")


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    found, end = "", 0
    for field in _FIELD.finditer(pattern):
        found += re.escape(pattern[end : field.start()])
        found += f"(?P<{field[1]}>\\d+)" if field[1] else "(?P<REST>.*)"
        end = field.end()
    try:
        return re.compile(found + re.escape(pattern[end:]))
    except re.error as error:
        raise TorchError(
            f"mapping: {pattern!r} has a field twice; expected each of {{i}}, {{j}} "
            "... and * once."
        ) from error


def _translate(path: str, source: str, target: str, old: str, new: str) -> str | None:
    """Translate a path from the pattern `source` to `target`; None if no match."""
    found = _regex(source).fullmatch(path)
    if found is None:
        return None
    fields = {
        field[1]: int(found[field[1]]) - int(field[2] or 0)
        for field in _FIELD.finditer(source)
        if field[1]
    }

    def fill(field: re.Match[str]) -> str:
        if field[1] is None and "*" in source:
            return found["REST"].replace(old, new)
        if field[1] in fields:
            return str(fields[field[1]] + int(field[2] or 0))
        raise TorchError(
            f"mapping: {source!r} and {target!r} have different fields; expected "
            f"{field[0]} in both."
        )

    return _FIELD.sub(fill, target)


def as_layer(given: str | Layer | None) -> Layer:
    """Return a value of a mapping as a layer."""
    return given if isinstance(given, Layer) else Layer(given or "")


def find(name: str, mapping: LayerMapping) -> tuple[Layer | None, str] | None:
    """Return the Flax layer for a tensor, and the tensor's name in that layer.

    The layer is None if the mapping drops the tensor. The result is None if no pattern
    matches.
    """
    layer, _, last = name.rpartition(".")
    for pattern, given in mapping.items():
        target = as_layer(given)
        for path, inner in ((layer, last), (name, "")):
            if inner and inner not in TENSORS:
                continue
            ours = _translate(path, pattern, target.path, ".", "/")
            if ours is not None and given is None:
                return None, ""
            if ours is not None:
                found = dataclasses.replace(target, path=ours)
                return found, "running_mean" if target.subtract else inner
    return None


def _named(key: tuple[str, str], leaf: Leaf, mapping: LayerMapping) -> Iterator[Pair]:
    """Yield the PyTorch tensors that a Flax array is written to."""
    path, last = key
    done = False
    for pattern, given in mapping.items():
        target = as_layer(given)
        if given is None or (last != "running_mean" if target.subtract else done):
            continue
        name = _translate(path, target.path, pattern, "/", ".")
        if name is not None and not target.subtract:
            name, done = ".".join(filter(None, (name, last))), True
        if name is not None:
            yield Pair(name, leaf, target)


def _kept(ours: Mapping[Any, Leaf], keep: Sequence[str]) -> set[Leaf]:
    kept: set[Leaf] = set()
    for prefix in keep:
        found = {
            leaf
            for leaf in ours.values()
            if f"{leaf}/".startswith(f"{prefix}/")
            or f"{leaf.layer}/{leaf.path[-1]}/".startswith(f"{prefix}/")
        }
        if not found:
            raise TorchError(
                f"keep: there is no {prefix!r}.{_hint(prefix, ours)} Expected the path "
                "of a Flax layer or array, or the start of one."
            )
        kept |= found
    return kept


def _check_flattened(pairs: Sequence[Pair], ours: Mapping[Any, Leaf]) -> None:
    """Refuse a matrix if its input may be a flattened map and the mapping is silent.

    The shape of the matrix does not show the map. If a layer has as many output
    features as the matrix has rows, the input is not flattened.
    """
    kernels = [leaf.shape for leaf in ours.values() if leaf.path[-1] == "kernel"]
    maps = [shape for shape in kernels if len(shape) > 2]
    if not maps:
        return
    widths = {shape[-1] for shape in kernels} | {shape[-2] for shape in maps}
    for pair in pairs:
        leaf, rows = pair.leaf, pair.leaf.shape[:1]
        matrix = leaf.path[-1] == "kernel" and len(leaf.shape) == 2
        if matrix and pair.layer.channels is None and widths.isdisjoint(rows):
            name = pair.name.rpartition(".")[0]
            raise TorchError(
                f"{leaf} has {rows[0]} rows, and no layer has as many features: its "
                "input may be a flattened feature map, and PyTorch and Flax flatten in "
                "different orders. Expected the number of channels of that map in the "
                f"mapping, {name!r}: Layer({leaf.layer!r}, channels=...); or 1 if its "
                "input is not flattened."
            )


def _check_fit(problems: Sequence[str], shown: int = 40) -> None:
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    if problems:
        raise TorchError(
            "the state dict does not fit the network:\n  "
            + "\n  ".join([*problems[:shown], *more])
            + "\nBuild the same network; or give in the mapping the path of each "
            "PyTorch layer (None to drop it), and in keep the Flax arrays that keep "
            "their values."
        )


def _missing(layer: Layer, last: str, name: str, ours: Mapping[Any, Leaf]) -> str:
    """Return why there is no array for a tensor."""
    if not any(leaf.layer == layer.path for leaf in ours.values()):
        return f"the network has no {layer.path!r}.{_hint(layer.path, ours)}"
    advice = (
        f". If only a normalization follows it, {name!r}: Layer(<its path>, "
        "subtract=True) in the mapping moves it into the running mean"
    )
    found = f"the Flax layer {layer.path} has no {last}"
    return f"{found}{advice if last == 'bias' else ''}"


def _hint(given: str, ours: Mapping[Any, Leaf]) -> str:
    starts = {leaf.layer.rsplit("/", n)[0] for leaf in ours.values() for n in range(3)}
    return did_you_mean(given, starts)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts "layer.10" after "layer.2"."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def classes_in(
    state: Mapping[str, Any], mapping: LayerMapping, layer: str = "logits"
) -> int | None:
    """Return the number of classes of a Flax layer in a state dict, or None."""
    for name in state:
        found, last = find(name, mapping) or (None, "")
        if found is not None and (found.path, last) == (layer, "bias"):
            return np.shape(state[name])[0]
    return None


def as_array(value: Any, name: str) -> np.ndarray:
    """Return an array or a PyTorch tensor as an array of its dtype."""
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
            f"{name} is not a plain tensor: {first_line(error)} Expected a dense "
            "tensor of numbers: save a dense tensor in PyTorch."
        ) from error


def batch_norm_options(
    momentum: float | None = 0.1, eps: float = 1e-5, *, affine: bool = True
) -> dict[str, Any]:
    """Return options of `bnjax.linen.BatchNorm` that match a torch.nn.BatchNorm.

    PyTorch's momentum is the weight of the new statistics; Flax's momentum is 1 minus
    PyTorch's.

    Args:
        momentum: PyTorch's momentum.
        eps: the number added to the variance.
        affine: whether the layer has a scale and bias.

    Returns:
        Keyword arguments of `bnjax.linen.BatchNorm`.
    """
    if momentum is None:
        raise TorchError(
            "momentum=None, the plain mean over all batches, has no counterpart in "
            "BatchNorm; expected a number. Use a number such as 0.1, or the layer "
            "bnjax.variants.averages.AveragedBatchNorm(momentum=None)."
        )
    return {
        # Round off the error of 1 - 0.9.
        "momentum": round(1 - momentum, 12),
        "epsilon": eps,
        "unbiased": True,
        "use_scale": affine,
        "use_bias": affine,
    }


def torch_batch_norm_options(
    momentum: float = 0.99, epsilon: float = 1e-5
) -> dict[str, float]:
    """Return options of torch.nn.BatchNorm that match a `bnjax.linen.BatchNorm`.

    PyTorch keeps the unbiased variance, as `unbiased=True` does.

    Args:
        momentum: Flax's momentum, the weight of the old statistics.
        epsilon: the number added to the variance.

    Returns:
        Keyword arguments of torch.nn.BatchNorm.
    """
    return {"momentum": round(1 - momentum, 12), "eps": epsilon}
