"""A model with its batch norm layers exchanged, and the proof that it is the same."""

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
    """Exchange the batch norm layers of a model, and prove that it still is the same.

    Flax's layers and bnjax's are exchanged, wherever they are in the model. The outputs
    in evaluation on `inputs` are computed before and after. Unless `may_change`,
    they must be equal to rounding.

    Args:
        model: a flax.linen.Module that is not bound, or an nnx.Module. It stays as it
            is.
        to: a `ToBatchNorm`, `ToFrozen` or `ToGroupNorm`.
        *inputs: what the model is called with: a batch, small but of real examples.
        variables: of a linen model, "params" and "batch_stats" among them.
        layers: those to exchange, None for all: names such as "block/bn" or patterns
            such as "block/*" (`*` also matches "/"), one or several, or a function of
            the name and the layer.
        may_change: leave out the comparison, because the function is meant to change.
        tolerance: how far outputs may differ, relative to the largest of each array;
            None for the square root of its dtype's epsilon (3e-4 for float32, and for
            float64, since parameters and statistics are float32 there too).
        **kwargs: keywords of the call in evaluation, such as `train=False`; in linen
            also those of `apply`, such as `method` or `rngs`. In nnx, `eval()` is set.

    Returns:
        For nnx the new model, in the mode of the old one. For linen the new model and
        its variables; these are new for `ToGroupNorm` alone. The new model is of a
        subclass of the old one's class, and is used as the old one is.

    Raises:
        ValueError: where the outputs differ, are not finite or 0 everywhere; where
            `ToGroupNorm` is asked for without `may_change`; for a layer of a class
            whose own call would be lost, such as one that applies an activation; where
            `layers` fits none.
        TypeError: for a model that is of neither kind, or without `variables`.

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
            "convert: ToGroupNorm makes another function of the model, with a new "
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
                f"convert: layers={layers!r}; expected None for all, a name or a "
                "pattern such as 'block_1/*', several of them, or a function of the "
                "name and the layer."
            )
    conversion = Conversion(to, layers)
    compare = None if may_change else functools.partial(_compare, tolerance=tolerance)
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError(
                "convert: variables was given with an nnx.Module, which has its own; "
                "expected none."
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


# flax.nnx: a layer of a copy of the model changes its class, so that all who refer to
# it refer to what it has become.


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
    """Refuse outputs of evaluation that are not equal, or that prove nothing."""
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(f"convert: the outputs were {old} and are {new} now.")
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
            raise ValueError(f"{place} was {kinds[0]} and is {kinds[1]} now.")
        limit = tolerance
        if limit is None:
            # Parameters and statistics are float32 beside a float64 output too.
            kind = jnp.finfo(jnp.result_type(old))
            limit = max(float(kind.eps), float(jnp.finfo(jnp.float32).eps)) ** 0.5
        a, b = (np.asarray(x).astype(np.complex128) for x in (old, new))
        if not np.isfinite(a).all():
            raise ValueError(
                f"{place} is not finite before any layer is exchanged; expected inputs "
                "and variables with finite outputs, which can be compared."
            )
        size = np.abs(a).max(initial=0)
        error = np.abs(a - b).max(initial=0)
        if not error <= limit * size:
            raise ValueError(
                f"{place} changes by {error:.3g}, its largest value is {size:.3g}; "
                f"expected at most {limit:.3g} of that. The layers compute something "
                "else now: look for another epsilon, or for a call that is not one of "
                "evaluation. If another function is what you want, pass "
                "may_change=True."
            )
        largest = max(largest, size)
    if largest == 0:
        raise ValueError(
            "convert: the outputs are 0 everywhere, so that comparing them proves "
            "nothing; expected others. Give variables that are trained or whose last "
            "layer does not start at 0, or in linen method=... that returns features."
        )
