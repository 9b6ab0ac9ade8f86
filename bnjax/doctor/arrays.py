"""The arrays of a linen or nnx network: their paths, their replicas, their decay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bnjax.doctor.calls import all_finite, host
from bnjax.population import LinenNetwork, NnxNetwork, array_name

Network = LinenNetwork | NnxNetwork
Keys = tuple[Any, ...]
UPDATES = 2
"""The number of updates that show a decay; a warm-up may start at learning rate 0."""


def named_arrays(network: Network) -> dict[str, Any]:
    """Return every array of a network except random keys, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(_state(network))
    return {
        path_of(network, keys): leaf
        for keys, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    }


def params_of(network: Network) -> Any:
    """Return the tree of the parameters."""
    if isinstance(network, LinenNetwork):
        return network.variables.get("params", {})
    return nnx.state(network.model, nnx.Param)


def path_of(network: Network, keys: Keys) -> str:
    """Return the path of an array, without linen's collection and nnx's wrapper.

    `keys` are JAX's keys, in the variables or in the state.
    """
    keys = keys[1:] if isinstance(network, LinenNetwork) else keys
    return array_name(keys)


def params_by_path(network: Network) -> dict[str, Any]:
    """Return every parameter by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params_of(network))
    return {array_name(keys): leaf for keys, leaf in leaves}


def with_params(network: Network, params: Any) -> Network:
    """Return the network with other parameters."""
    if isinstance(network, LinenNetwork):
        new = {**network.variables, "params": params}
        expected, given = map(jax.tree.structure, (network.variables["params"], params))
        if expected != given:
            raise ValueError(
                f"doctor: params_before_average has the structure {given}; expected "
                f"the structure of the parameters, {expected}."
            )
        return LinenNetwork(new)
    model = nnx.clone(network.model)
    nnx.update(model, params)
    return NnxNetwork(model)


def first_replica(network: Network) -> Network:
    """Return the network with the first entry of each array's first axis."""
    first = jax.tree.map(lambda leaf: leaf[0], _state(network))
    if isinstance(network, LinenNetwork):
        return LinenNetwork(first)
    model = nnx.clone(network.model)
    nnx.update(model, first)
    return NnxNetwork(model)


def differing_replicas(
    network: Network, *, replicated: bool
) -> dict[str, tuple[int, float]]:
    """Return the arrays whose copies differ: the copies, the largest difference.

    If `replicated`, the copies are the entries of the first axis. Otherwise they are
    the shards of an array that should be equal on all devices.
    """
    found = {}
    for path, leaf in named_arrays(network).items():
        copies: Any = ()
        if replicated:
            copies = host(leaf)
        elif isinstance(leaf, jax.Array) and leaf.sharding.is_fully_replicated:
            copies = [host(shard.data) for shard in leaf.addressable_shards]
        if len(copies) > 1:
            first, *others = copies
            if not all(np.array_equal(first, o, equal_nan=True) for o in others):
                wide = [np.float64(copy) for copy in copies]
                apart = [np.abs(copy - wide[0]).max() for copy in wide[1:]]
                found[path] = len(copies), float(max(apart))
    return found


def nonfinite_array(network: Network, batch: Any) -> tuple[str, str] | None:
    """Return the first array with a value that is not finite, if there is one."""
    if not all_finite(batch):
        return "(batch)", "values"
    for path, leaf in named_arrays(network).items():
        if not all_finite(leaf):
            return path, "values"
    return None


def decay_rates(
    network: Network,
    layers: Sequence[str],
    optimizer: Any,
    penalty: Callable[[Any], Any] | None,
) -> Mapping[str, float]:
    """Return the scales and biases that decay, and the fraction lost in each step.

    The optimizer updates parameters of 0 and of 1 with gradients of 0. If it decays a
    parameter, the two updates differ. For a penalty, its gradient shows the decay.
    """
    pulls = []
    # One value for each array is enough: masks select arrays by name and rank.
    ones = jax.tree.map(lambda p: np.ones((1,) * p.ndim, p.dtype), params_of(network))
    zeros = jax.tree.map(np.zeros_like, ones)
    if optimizer is not None:
        try:
            updates = [_update(optimizer, ones, zeros, p) for p in (zeros, ones)]
        except Exception as error:
            raise TypeError(
                "doctor: optimizer.update(gradients, state, params) failed "
                f"({type(error).__name__}: {error}); expected an Optax optimizer "
                "that needs no other argument. Omit optimizer, or give only the "
                "transformation that decays."
            ) from error
        pulls.append(jax.tree.map(lambda without, new: without - new, *updates))
    if penalty is not None:
        pulls.append(jax.grad(penalty)(ones))
    found = {}
    for pull in pulls:
        for keys, leaf in jax.tree_util.tree_leaves_with_path(pull):
            path = array_name(keys)
            layer, _, name = path.rpartition("/")
            own = name in ("scale", "bias") and (layer or "(top level)") in layers
            if own and (rate := float(jnp.sum(leaf))) > 0:
                found[path] = rate
    return found


def _update(optimizer: Any, initial: Any, gradients: Any, params: Any) -> Any:
    optimizer = getattr(optimizer, "tx", optimizer)
    state, updates = optimizer.init(initial), gradients
    for _ in range(UPDATES):
        updates, state = optimizer.update(gradients, state, params)
    return updates


def _state(network: Network) -> Any:
    if isinstance(network, LinenNetwork):
        return network.variables
    return nnx.state(network.model)
