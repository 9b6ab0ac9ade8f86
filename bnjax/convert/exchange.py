"""Replace the batch norm layers of a model, and check that the outputs stay equal."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from bnjax._validate import layer_name
from bnjax.convert.linen import convert_linen
from bnjax.convert.targets import Conversion, Layers, Target, ToGroupNorm

Network = TypeVar("Network", bound=nnx.Module)


@overload
def convert(
    model: nn.Module,
    to: Target,
    *inputs: Any,
    variables: Mapping[str, Any],
    layers: Layers = None,
    may_change: bool = False,
    tolerance: float | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Mapping[str, Any]]: ...


@overload
def convert(
    model: Network,
    to: Target,
    *inputs: Any,
    layers: Layers = None,
    may_change: bool = False,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Network: ...


def convert(
    model: Any,
    to: Target,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    layers: Layers = None,
    may_change: bool = False,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Any:
    """Replace the batch norm layers of a model, and check that the outputs stay equal.

    The function replaces Flax's and bnjax's batch norm layers at any depth of the
    model. It computes the outputs of evaluation on `inputs` before and after. The
    outputs must be equal up to rounding, unless `may_change` is True.

    Args:
        model: an unbound `flax.linen.Module` or an `nnx.Module`. The model itself does
            not change.
        to: a `ToBatchNorm`, `ToFrozen` or `ToGroupNorm`.
        *inputs: the inputs of the model: a small batch of real examples.
        variables: the variables of a linen model, with "params" and "batch_stats".
        layers: the layers to replace: one or several names such as `"block/bn"` or
            patterns such as `"block/*"` (`*` also matches `/`), or a function of the
            name and the layer. None replaces all layers.
        may_change: skip the comparison, because the function is meant to change.
        tolerance: the largest difference of the outputs, relative to the largest value
            of each array. None is the square root of the dtype's epsilon (3e-4 for
            float32, and for float64, because parameters and statistics are float32
            there too).
        **kwargs: keywords of the call in evaluation, such as `train=False`; for linen
            also keywords of `apply`, such as `method` or `rngs`. An nnx model is
            called after `eval()`.

    Returns:
        For nnx, the new model in the mode of the old one. For linen, the new model and
        its variables; only `ToGroupNorm` makes new variables. The class of the new
        model is a subclass of the old model's class, and you use it in the same way.

    Raises:
        ValueError: if the outputs differ, are not finite, or are 0 everywhere; if `to`
            is a `ToGroupNorm` and `may_change` is False; if the class of a layer has a
            call of its own that would be lost, such as one that applies an activation;
            or if `layers` matches no layer.
        TypeError: if the model is of neither kind, or if `variables` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn, nnx
        >>> from bnjax.convert import ToBatchNorm, convert
        >>> x = jax.random.normal(jax.random.key(0), (8, 3))
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        ... )
        >>> shared = convert(model, ToBatchNorm(axis_name="data"), x)
        >>> type(shared.layers[1]).__module__, shared.layers[1].axis_name
        ('bnjax.nnx', 'data')

        >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
        >>> variables = model.init(jax.random.key(0), x)
        >>> training, _ = convert(
        ...     model, ToBatchNorm(use_running_average=False), x, variables=variables
        ... )
        >>> y, updates = training.apply(variables, x, mutable=["batch_stats"])
    """
    if isinstance(to, ToGroupNorm) and not may_change:
        raise ValueError(
            "convert: ToGroupNorm changes the function of the model and gives it a new "
            "scale and bias; expected may_change=True, and training afterwards."
        )
    if not isinstance(to, Target):
        raise TypeError(
            f"convert: to={to!r}; expected a ToBatchNorm, ToFrozen or ToGroupNorm."
        )
    if not inputs and not kwargs:
        raise TypeError(
            "convert: no inputs; expected what the model is called with, such as "
            "convert(model, ToBatchNorm(), images)."
        )
    if not (layers is None or callable(layers)):
        layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if not layers or not all(isinstance(each, str) for each in layers):
            raise TypeError(
                f"convert: layers={layers!r}; expected None for all layers, one or "
                "several names or patterns such as 'block_1/*', or a function of the "
                "name and the layer."
            )
    conversion = Conversion(to, layers)
    compare = None if may_change else functools.partial(_compare, tolerance=tolerance)
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError(
                "convert: variables was given with an nnx.Module, which holds its own "
                "variables; expected variables=None."
            )
        return _convert_nnx(model, conversion, compare, inputs, kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert: model is of type {type(model).__name__}; expected a module of "
            "flax.linen or flax.nnx."
        )
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"convert: variables is of type {type(variables).__name__}; expected the "
            "variables of the linen model, such as {'params': ..., 'batch_stats': ...}."
        )
    return convert_linen(model, variables, conversion, compare, inputs, kwargs)


# flax.nnx: each layer in a copy of the model changes its class in place, so that every
# reference to the layer remains valid.


def _convert_nnx(
    model: nnx.Module,
    conversion: Conversion,
    compare: Callable[[Any, Any], None] | None,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nnx.Module:
    new = nnx.clone(model)
    found = {
        layer_name(path): layer
        for path, layer in nnx.iter_modules(new)
        if isinstance(layer, nnx.BatchNorm)
    }
    for name, layer in conversion.choose(found).items():
        conversion.to.nnx(name, layer)

    def outputs(model: Any) -> Any:
        evaluated = nnx.clone(model)
        evaluated.eval()
        return evaluated(*inputs, **kwargs)

    if compare is not None:
        compare(outputs(model), outputs(new))
    return new


def _compare(before: Any, after: Any, tolerance: float | None) -> None:
    """Refuse outputs of evaluation that are not equal or that cannot be compared."""
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(f"convert: the outputs were {old} and are now {new}.")
    largest = 0.0
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    for (path, old), new in leaves:
        if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
            continue
        place = f"convert: the output{jax.tree_util.keystr(path)}"
        kinds = [f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (old, new)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{place} was {kinds[0]} and is now {kinds[1]}.")
        limit = tolerance
        if limit is None:
            # Parameters and statistics are float32 even if the output is float64.
            kind = jnp.finfo(jnp.result_type(old))
            limit = max(float(kind.eps), float(jnp.finfo(jnp.float32).eps)) ** 0.5
        a, b = (np.asarray(x).astype(np.complex128) for x in (old, new))
        if not np.isfinite(a).all():
            raise ValueError(
                f"{place} is not finite before any layer is replaced; expected inputs "
                "and variables with finite outputs, which can be compared."
            )
        size = np.abs(a).max(initial=0)
        error = np.abs(a - b).max(initial=0)
        if not error <= limit * size:
            raise ValueError(
                f"{place} changes by {error:.3g}, and its largest value is {size:.3g}; "
                f"expected a change of at most {limit:.3g} times the largest value. "
                "The layers now compute another function: check epsilon, and check "
                "that the call is one of evaluation. If the function is meant to "
                "change, pass may_change=True."
            )
        largest = max(largest, size)
    if largest == 0:
        raise ValueError(
            "convert: the outputs are 0 everywhere, so that comparing them proves "
            "nothing; expected outputs that are not 0. Give trained variables, "
            "variables whose last layer does not start at 0, or, in linen, a "
            "method=... that returns features."
        )
