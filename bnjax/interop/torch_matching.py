"""Which array of a PyTorch model is which of a Flax model."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from bnjax._validate import did_you_mean
from bnjax.interop.torch_files import TorchError, natural
from bnjax.interop.torch_layers import Layer, Leaf, layers_of, shortcuts_last
from bnjax.interop.torch_mapping import COUNTER, NameMapping, Pair
from bnjax.interop.torch_trace import Call

LEAVES = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class TorchLayer:
    """The tensors of one layer of PyTorch.

    Args:
        path: "layer1.0.conv1".
        names: of its tensors, by "weight", "bias" ...; by "" of a tensor alone.
        shapes: likewise.
    """

    path: str
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def match(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    calls: Sequence[Call] | None = None,
    names: Mapping[str, str] | None = None,
    channels: Mapping[str, int | None] | None = None,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> NameMapping:
    """Find which tensor of a state dict is which array of a model.

    Layers whose arrays have the same shapes in PyTorch's layout belong together; where
    several have, the first of one is the first of the other, a block's shortcut being
    taken for its last layer. Look at the rows "by order" of the table.

    A bias before a normalization, where there is none here, is subtracted from the
    running mean, which comes to the same; `calls` are needed to see that it is before.

    Args:
        state: arrays or tensors by name.
        variables: of the model; see `from_torch`.
        calls: the model's layers as `trace` gives them: in the order of their calls,
            with what is flattened before a layer. Without them the order is that of
            the names, and the map of the last convolution reaches the first matrix,
            flattened or averaged; give them where there may be doubt.
        names: layers or blocks of PyTorch by the path of ours, such as
            {"layer1": "stage1", "fc": "logits"}: they are matched among themselves.
        channels: of the feature map that reaches a layer flattened, by the path of the
            layer; None where none does.
        ignore: layers or blocks of PyTorch that go nowhere.
        keep: layers, blocks, arrays or collections of ours that keep their values.

    Returns:
        The mapping.

    Raises:
        TorchError: arrays are missing, too many or of other shapes, and all are named;
            or a name given is unknown.

    Example:
        >>> state = {
        ...     "1.weight": np.ones(8),
        ...     "1.bias": np.ones(8),
        ...     "0.weight": np.ones((8, 3, 5, 5)),
        ... }
        >>> params = {
        ...     "bn": {"bias": np.ones(8), "scale": np.ones(8)},
        ...     "conv": {"kernel": np.ones((5, 5, 3, 8))},
        ... }
        >>> print(match(state, {"params": params}))
        PyTorch   shape         bnjax               shape         layout        by
        1.weight  (8,)          params/bn/scale     (8,)          as it is      shape
        1.bias    (8,)          params/bn/bias      (8,)          as it is      shape
        0.weight  (8, 3, 5, 5)  params/conv/kernel  (5, 5, 3, 8)  OIHW -> HWIO  shape
    """
    names = names or {}
    theirs = _torch_layers(state)
    ours = {layer.path: layer for layer in layers_of(variables, calls, channels)}
    arrays = [
        path for layer in ours.values() for e in layer.leaves for path in _paths(e)
    ]
    _check_known("names", names, theirs, ".")
    _check_known("names", names.values(), ours, "/")
    _check_known("channels", channels or (), ours, "/")
    _check_known("ignore", ignore, [*theirs, *state], ".")
    _check_known("keep", keep, arrays, "/")

    ignored = [name for name in state if _under(name, ignore, ".")]
    wanted = {p: layer for p, layer in theirs.items() if not _under(p, ignore, ".")}
    needed, kept = _without(ours, keep)
    pairs = _pairs(wanted, needed, names, calls or ())
    found = {name for pair in pairs for name in (pair.name, pair.bias)}
    over = [_rest(layer, found) for layer in wanted.values()]
    over = [layer for layer in over if layer.names]
    done = {pair.leaf for pair in pairs}
    left = [layer for layer in needed.values() if not done.issuperset(layer.leaves)]
    if over or left:
        raise _misfit(over, left)
    order = {name: i for i, name in enumerate(state)}
    counters = [name for name in state if name.rpartition(".")[2] == COUNTER]
    return NameMapping(
        tuple(sorted(pairs, key=lambda pair: order[pair.name])),
        tuple(name for name in counters if name not in ignored),
        tuple(ignored),
        tuple(kept),
    )


def _without(
    layers: Mapping[str, Layer], keep: Sequence[str]
) -> tuple[dict[str, Layer], list[str]]:
    """Return layers without the arrays to keep, and the paths of those."""
    needed, kept = {}, []
    for path, layer in layers.items():
        leaves = []
        for leaf in layer.leaves:
            if any(_under(each, keep, "/") for each in _paths(leaf)):
                kept.append(_paths(leaf)[0])
            else:
                leaves.append(leaf)
        if leaves:
            needed[path] = dataclasses.replace(layer, leaves=tuple(leaves))
    return needed, kept


def _rest(layer: TorchLayer, found: Collection[str]) -> TorchLayer:
    names = {leaf: name for leaf, name in layer.names.items() if name not in found}
    shapes = {leaf: layer.shapes[leaf] for leaf in names}
    return dataclasses.replace(layer, names=names, shapes=shapes)


def _pairs(
    theirs: Mapping[str, TorchLayer],
    ours: Mapping[str, Layer],
    names: Mapping[str, str],
    calls: Sequence[Call],
) -> list[Pair]:
    """Pair the arrays of layers that have equal shapes, in order."""
    given = {path: name for name, path in names.items()}
    here: dict[Any, list[Layer]] = {}
    for path in shortcuts_last(list(ours), "/"):
        near = _under(path, given, "/")
        shapes = {leaf.name: leaf.torch_shape for leaf in ours[path].leaves}
        key = near and given[near], frozenset(shapes.items())
        here.setdefault(key, []).append(ours[path])
    there: dict[Any, list[TorchLayer]] = {}
    for path in shortcuts_last(list(theirs), "."):
        label, shapes = _under(path, names, "."), theirs[path].shapes
        key = label, frozenset(shapes.items())
        if key not in here and len(shapes.get("weight", ())) > 1:
            key = label, frozenset({"weight": shapes["weight"]}.items())
        there.setdefault(key, []).append(theirs[path])
    pairs: list[Pair] = []
    biases: dict[str, str] = {}
    for key, layers in here.items():
        others = there.get(key, [])
        alone = len(layers) == len(others) == 1
        by = ("given" if key[0] else "shape") if alone else "order"
        for layer, other in zip(layers, others, strict=False):
            pairs += [Pair(leaf, other.names[leaf.name], by) for leaf in layer.leaves]
            if len(other.names) > len(layer.leaves):
                biases[layer.path] = other.names["bias"]
    before = {call.path: call.follows or "" for call in calls}
    for i, pair in enumerate(pairs):
        layer = _paths(pair.leaf)[1].rpartition("/")[0]
        if pair.leaf.name == "running_mean":
            bias = biases.get(before.get(layer, ""), "")
            pairs[i] = dataclasses.replace(pair, bias=bias)
    return pairs


def _paths(leaf: Leaf) -> tuple[str, str]:
    """Return the path of an array with its collection and without."""
    parts = tuple(map(str, leaf.path))
    return "/".join(parts), "/".join(parts[1:])


def _torch_layers(state: Mapping[str, Any]) -> dict[str, TorchLayer]:
    if not state:
        raise TorchError("the state dict is empty; expected tensors by name.")
    order = list(state)
    if order == sorted(order):
        order.sort(key=natural)
    found: dict[str, TorchLayer] = {}
    for name in order:
        path, _, leaf = name.rpartition(".")
        if leaf == COUNTER:
            continue
        if leaf not in LEAVES:
            path, leaf = name, ""
        layer = found.setdefault(path, TorchLayer(path, {}, {}))
        layer.names[leaf] = name
        layer.shapes[leaf] = tuple(np.shape(state[name]))
    return found


def _under(path: str, prefixes: Any, separator: str) -> str | None:
    """Return the longest of some prefixes, whole parts of them, that a path has."""
    fitting = [p for p in prefixes if f"{path}{separator}".startswith(p + separator)]
    return max(fitting, key=len, default=None)


def _check_known(option: str, given: Any, paths: Any, separator: str) -> None:
    for prefix in given:
        if all(_under(path, [prefix], separator) is None for path in paths):
            starts = {path.rsplit(separator, n)[0] for path in paths for n in range(3)}
            raise TorchError(
                f"{option}: there is no {prefix!r}.{did_you_mean(prefix, starts)} "
                f"Expected a layer or the start of its path, one of: "
                f"{', '.join(sorted(starts, key=natural))}."
            )


def _misfit(theirs: list[TorchLayer], ours: list[Layer]) -> TorchError:
    """Name every array that has no counterpart."""
    lines = []
    for layer in ours:
        needs = {leaf.name: leaf for leaf in layer.leaves}
        near = _nearest(theirs, needs)
        if near is None:
            lines += [f"nothing for {_told(leaf)}" for leaf in layer.leaves]
            continue
        theirs.remove(near)
        for name, leaf in needs.items():
            if name not in near.names:
                lines.append(f"nothing for {_told(leaf)}: {near.path} has no {name}")
            elif near.shapes[name] != leaf.torch_shape:
                lines.append(
                    f"{near.names[name]} {near.shapes[name]} for {_told(leaf)}"
                )
        for name in near.names.keys() - needs.keys():
            lines.append(
                f"no place for {near.names[name]} {near.shapes[name]}: our "
                f"{layer.path} has no such array"
            )
    for layer in theirs:
        for name, full in layer.names.items():
            lines.append(f"no place for {full} {layer.shapes[name]}")
            if list(layer.names) == ["bias"]:
                lines[-1] += (
                    ": our layer has no bias. Where a normalization follows it, "
                    "calls=trace(model, images, train=False) takes it into the mean"
                )
    return TorchError(
        "the state dict does not fit the network; of layers alike the last are named:"
        "\n  "
        + "\n  ".join(lines)
        + "\nBuild the same network; or leave tensors of theirs out with ignore, let "
        "arrays of ours keep their values with keep, say which layer is which with "
        "names."
    )


def _told(leaf: Leaf) -> str:
    return f"{'/'.join(map(str, leaf.path))}, which needs {leaf.torch_shape}"


def _nearest(theirs: list[TorchLayer], needs: Mapping[str, Leaf]) -> TorchLayer | None:
    """Return the first layer of equal weight, or else the first of equal names."""
    for layer in theirs:
        weight = needs.get("weight")
        if weight and layer.shapes.get("weight") == weight.torch_shape:
            return layer
    for layer in theirs:
        ranks = {name: len(shape) for name, shape in layer.shapes.items()}
        if ranks == {name: len(leaf.shape) for name, leaf in needs.items()}:
            return layer
    return None
