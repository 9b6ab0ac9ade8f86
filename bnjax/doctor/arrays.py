"""The arrays of a network, linen's or nnx's: by path, their replicas, their decay."""

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
"""How many updates show a decay: a warm-up may start from a learning rate of 0."""


def named_arrays(network: Network) -> dict[str, Any]:
    """Every array of a network but its random keys, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(_state(network))
    return {
        path_of(network, keys): leaf
        for keys, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    }


def params_of(network: Network) -> Any:
    """The tree of the parameters."""
    if isinstance(network, LinenNetwork):
        return network.variables.get("params", {})
    return nnx.state(network.model, nnx.Param)


def path_of(network: Network, keys: Keys) -> str:
    """The path of an array: without linen's collection, without what nnx wraps it in.

    `keys` are those of JAX, in the variables or in the state.
    """
    keys = keys[1:] if isinstance(network, LinenNetwork) else keys
    return array_name(keys)


def params_by_path(network: Network) -> dict[str, Any]:
    """Every parameter by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params_of(network))
    return {array_name(keys): leaf for keys, leaf in leaves}


def with_params(network: Network, params: Any) -> Network:
    """The network with other parameters."""
    if isinstance(network, LinenNetwork):
        new = {**network.variables, "params": params}
        expected, given = map(jax.tree.structure, (network.variables["params"], params))
        if expected != given:
            raise ValueError(
                f"doctor: params_before_average has the structure {given}; expected "
                f"that of the parameters, {expected}."
            )
        return LinenNetwork(new)
    model = nnx.clone(network.model)
    nnx.update(model, params)
    return NnxNetwork(model)


def first_replica(network: Network) -> Network:
    """The network with the first entry of each array's first axis."""
    first = jax.tree.map(lambda leaf: leaf[0], _state(network))
    if isinstance(network, LinenNetwork):
        return LinenNetwork(first)
    model = nnx.clone(network.model)
    nnx.update(model, first)
    return NnxNetwork(model)


def differing_replicas(
    network: Network, *, replicated: bool
) -> dict[str, tuple[int, float]]:
    """The arrays whose copies differ: how many copies, the largest difference.

    Copies are the entries of the first axis where `replicated`, or what each device
    holds of an array that should be the same on all.
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
    """The first array that has a value that is not finite, if there is one."""
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
    """The scales and biases of layers that are pulled to 0, and by which part a step.

    An optimizer is given gradients of 0, and ones for parameters, then zeros: what it
    makes of the two differs where it decays. Of a penalty the gradient is taken.
    """
    pulls = []
    # One value an array: masks go by names and ranks.
    ones = jax.tree.map(lambda p: np.ones((1,) * p.ndim, p.dtype), params_of(network))
    zeros = jax.tree.map(np.zeros_like, ones)
    if optimizer is not None:
        try:
            updates = [_update(optimizer, ones, zeros, p) for p in (zeros, ones)]
        except Exception as error:
            raise TypeError(
                "doctor: optimizer.update(gradients, state, params) failed "
                f"({type(error).__name__}: {error}); expected an optimizer of Optax "
                "that needs no more. Leave it out, or give the part that decays."
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
