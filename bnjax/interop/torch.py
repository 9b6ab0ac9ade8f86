"""Weights and statistics from PyTorch to Flax models, and back.

The layers of a state dict and those of a model are matched by the shapes of their
arrays and, among equal ones, by their order; the table says which is which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from bnjax.interop.torch_files import (
    TorchError,
    as_array,
    read_state_dict,
    write_state_dict,
)
from bnjax.interop.torch_layers import Leaf, layers_of
from bnjax.interop.torch_mapping import COUNTER, NameMapping, Pair
from bnjax.interop.torch_matching import match
from bnjax.interop.torch_trace import Call, trace

__all__ = (
    "Call",
    "NameMapping",
    "batch_norm_options",
    "from_torch",
    "match",
    "read_state_dict",
    "to_torch",
    "torch_batch_norm_options",
    "torch_names",
    "trace",
    "write_state_dict",
)


def from_torch(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    mapping: NameMapping | None = None,
) -> dict[str, Any]:
    """Return a model's variables with the values of a state dict of PyTorch.

    The layouts are changed: see `match`. `num_batches_tracked` has no counterpart and
    is left out.

    Args:
        state: arrays or tensors by name: of `read_state_dict`, or a `state_dict()`.
        variables: of the model, the collections "params" and "batch_stats" of linen or
            the tree of `nnx.to_pure_dict`; `jax.ShapeDtypeStruct` will do for arrays.
        mapping: from `match`; by default `match(state, variables)`.

    Returns:
        Variables of the same structure and dtypes. What was given stays as it was.

    Raises:
        TorchError: a tensor is missing, too many or of another shape; all are named.

    Example:
        >>> from flax import linen as nn
        >>> import jax
        >>> variables = nn.Dense(1).init(jax.random.key(0), jnp.ones((1, 2)))
        >>> state = {"fc.weight": np.array([[1.0, 2.0]]), "fc.bias": np.array([3.0])}
        >>> from_torch(state, variables)["params"]["kernel"].tolist()
        [[1.0], [2.0]]
    """
    mapping = match(state, variables) if mapping is None else mapping
    result = unfreeze(dict(variables))
    problems, found = [], []
    for pair in mapping.pairs:
        place = _place(result, pair.leaf)
        if place is None:
            problems.append(f"the variables have no {pair.path} {pair.leaf.shape}")
        for name in (pair.name, pair.bias) if pair.bias else (pair.name,):
            problems += _misfit(state, name, pair)
        found.append((pair, place))
    if problems:
        raise _unlike("state dict", problems)
    for pair, place in found:
        key, tensor = pair.leaf.path[-1], as_array(state[pair.name])
        if pair.bias:
            tensor = np.subtract(tensor, as_array(state[pair.bias]), dtype=np.float64)
        place[key] = jnp.asarray(pair.leaf.layout.from_torch(tensor), place[key].dtype)
    return result


def to_torch(
    variables: Mapping[str, Any],
    mapping: NameMapping | None = None,
    *,
    num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
    """Return a state dict of PyTorch with the values of a model's variables.

    Args:
        variables: of the model, as `from_torch` gives them.
        mapping: from `match`; by default the names are the model's own, see
            `torch_names`.
        num_batches_tracked: what every BN layer is told of the past; PyTorch reads it
            only where momentum=None.

    Returns:
        Arrays by name, for `write_state_dict`.

    Raises:
        TorchError: the mapping is of other variables.

    Example:
        >>> from bnjax.linen import BatchNorm
        >>> import jax
        >>> layer = BatchNorm(use_running_average=True)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> sorted(to_torch(variables))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    mapping = torch_names(variables) if mapping is None else mapping
    trees = unfreeze(dict(variables))
    state, problems = {}, []
    for pair in mapping.pairs:
        place = _place(trees, pair.leaf)
        if place is None:
            problems.append(f"{pair.path} {pair.leaf.shape} is not there")
            continue
        array = pair.leaf.layout.to_torch(np.asarray(place[pair.leaf.path[-1]]))
        state[pair.name] = np.asarray(array, order="C")
        if pair.bias:
            state[pair.bias] = np.zeros_like(state[pair.name])
    if problems:
        raise _unlike("model", problems)
    counters = dict.fromkeys(mapping.counters, np.int64(num_batches_tracked))
    return state | {name: np.asarray(value) for name, value in counters.items()}


def torch_names(
    variables: Mapping[str, Any],
    *,
    calls: Sequence[Call] | None = None,
    channels: Mapping[str, int | None] | None = None,
) -> NameMapping:
    """Return a mapping to PyTorch's names, for a network that is not there yet.

    Args:
        variables: of the model.
        calls: see `match`.
        channels: see `match`.

    Returns:
        A mapping in which "conv1/bn" is "conv1.bn".

    Example:
        >>> print(torch_names({"params": {"conv": {"kernel": np.ones((3, 3, 1, 8))}}}))
        PyTorch      shape         bnjax               shape         layout        by
        conv.weight  (8, 1, 3, 3)  params/conv/kernel  (3, 3, 1, 8)  OIHW -> HWIO  name
    """
    pairs, counters = [], []
    for layer in layers_of(variables, calls, channels):
        prefix = layer.path.replace("/", ".")
        for leaf in layer.leaves:
            name = ".".join(part for part in (prefix, leaf.name) if part)
            pairs.append(Pair(leaf, name, "name"))
            if leaf.name == "running_mean":
                counters.append(".".join(p for p in (prefix, COUNTER) if p))
    return NameMapping(tuple(pairs), tuple(counters))


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


def _place(tree: Any, leaf: Leaf) -> dict[Any, Any] | None:
    """Return the dict that holds an array of that path and shape, if one does."""
    for key in leaf.path[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    there = isinstance(tree, dict) and leaf.path[-1] in tree
    return tree if there and tree[leaf.path[-1]].shape == leaf.shape else None


def _misfit(state: Mapping[str, Any], name: str, pair: Pair) -> list[str]:
    """Say what keeps a tensor from being the array that it was mapped to."""
    if name not in state:
        return [f"{name} is missing, for {pair.path}"]
    tensor, shape = as_array(state[name]), pair.leaf.torch_shape
    if tensor.shape != shape:
        return [f"{name} is {tensor.shape}; {pair.path} needs {shape}"]
    if not jnp.issubdtype(tensor.dtype, np.floating):
        return [f"{name} is {tensor.dtype}, not floating"]
    return []


def _unlike(what: str, problems: Sequence[str]) -> TorchError:
    return TorchError(
        f"the mapping was made for another {what}:\n  "
        + "\n  ".join(problems)
        + "\nExpected the one it was made for; call match again."
    )
