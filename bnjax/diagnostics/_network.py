"""A network as one function of its parameters, for linen and nnx."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from bnjax.population import array_name


def split_params(variables: Any, caller: str) -> tuple[Any, Any, Any]:
    """Split variables into a hashable structure, the parameters and the rest.

    `join_params` is the inverse.

    Args:
        variables: the variables of a linen network, with "params", or an nnx.Module.
        caller: the name of the function for error messages.
    """
    if isinstance(variables, nnx.Module):
        structure, params, rest = nnx.split(variables, nnx.Param, ...)
        return structure, params, rest
    if not isinstance(variables, Mapping) or "params" not in variables:
        given = f"of type {type(variables).__name__}"
        if isinstance(variables, Mapping):
            given = f"a dict of {', '.join(map(str, variables)) or 'nothing'}"
        raise TypeError(
            f"{caller}: variables is {given}; expected a dict of collections such as "
            "{'params': ..., 'batch_stats': ...}, or an nnx.Module."
        )
    rest = {name: value for name, value in variables.items() if name != "params"}
    return None, variables["params"], rest


def join_params(structure: Any, params: Any, rest: Any) -> Any:
    """Return the variables, of a linen network or as a new nnx.Module."""
    if structure is None:
        return {**rest, "params": params}
    # An inner transform cannot write to variables of an outer transform.
    return nnx.merge(structure, params, rest, copy=True)


def param_names(params: Any) -> list[str]:
    """Return the path of each leaf of a tree of parameters, such as "bn_0/scale"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [array_name(keys) for keys, _ in leaves]
