"""The distribution of the inputs of nonlinearities, and how far it moves."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from bnjax.models.normalization import Normalization

SUFFIX = "_input"


class Movement(NamedTuple):
    """How far a curve moves.

    Attributes:
        path: the sum of the absolute steps.
        span: the difference between the highest and the lowest value.
    """

    path: np.ndarray
    span: np.ndarray


def nonlinearity_inputs(
    model: nn.Module, variables: Any, images: jax.Array, *, train: bool = False
) -> dict[str, jax.Array]:
    r"""Return the input of each nonlinearity of a network.

    $$u = \mathrm{BN}(W z) \quad\text{or, without BN,}\quad u = W z + b$$

    Args:
        model: a model with a field `normalization`, such as the models of
            `bnjax.models`.
        variables: the variables of the model. The function does not change them.
        images: floating images, shape (batch, ...).
        train: normalize by the statistics of these images, as in a training step;
            otherwise by the running statistics.

    Returns:
        Arrays of shape (batch, ..., features) by the path of the normalization layer,
        such as "bn_0". Under `jax.jit`, arrays that you do not use cost nothing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import nonlinearity_inputs
        >>> from bnjax.models import MLP
        >>> x = jnp.linspace(-1, 1, 60).reshape(12, 5)
        >>> variables = MLP((4, 3)).init(jax.random.key(0), x, train=False)
        >>> found = nonlinearity_inputs(MLP((4, 3)), variables, x, train=True)
        >>> {name: u.shape for name, u in found.items()}
        {'bn_0': (12, 4), 'bn_1': (12, 3)}

    References:
        Ioffe & Szegedy (2015), section 3.2 (the place of BN) and Figure 1b, c.
    """
    normalization = getattr(model, "normalization", None)
    if not isinstance(normalization, Normalization):
        raise TypeError(
            f"nonlinearity_inputs: {type(model).__name__} has no field `normalization` "
            f"of type bnjax.models.Normalization, but {normalization!r}; expected a "
            "model that passes its layers through one, as those of bnjax.models do."
        )
    recording: Any = model.clone(
        normalization=dataclasses.replace(normalization, record_inputs=True)
    )
    mutable = ["intermediates", "batch_stats"] if train else ["intermediates"]
    rngs = {"dropout": jax.random.key(0)} if train else None
    _, updated = recording.apply(
        variables, images, train=train, mutable=mutable, rngs=rngs
    )
    recorded: Any = flatten_dict(updated.get("intermediates", {}))
    found = {
        "/".join(path).removesuffix(SUFFIX): value
        for (*path, last), value in recorded.items()
        if last == "value" and path and path[-1].endswith(SUFFIX)
    }
    if not found:
        raise ValueError(
            f"nonlinearity_inputs: no layer of {type(model).__name__} goes through "
            "`normalization` with a nonlinearity; expected at least one."
        )
    return found


def input_percentiles(
    inputs: Mapping[str, Any], percentiles: Sequence[float] = (15, 50, 85)
) -> dict[str, np.ndarray]:
    """Return percentiles of the input of each nonlinearity, for each feature.

    The percentiles are over the examples and, in feature maps, also over the positions,
    with linear interpolation.

    Args:
        inputs: arrays of shape (batch, ..., features) by name, all or some of those
            that `nonlinearity_inputs` returns.
        percentiles: numbers from 0 to 100.

    Returns:
        Arrays of shape (percentiles, features), by the names of the inputs.

    Examples:
        >>> import numpy as np
        >>> u = np.array([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]])
        >>> print(input_percentiles({"bn_0": u}, (0, 50))["bn_0"])
        [[ 0. 10.]
         [ 1. 20.]]

    References:
        Ioffe & Szegedy (2015), Figure 1b, c.
    """
    # NumPy's partition takes a sixth of the time of XLA's sort on a CPU.
    return {
        name: np.percentile(np.asarray(u).reshape(-1, u.shape[-1]), percentiles, axis=0)
        for name, u in inputs.items()
    }


def movement(curve: Any, axis: int = 0) -> Movement:
    r"""Return how far a curve moves, in the units of its values.

    $$
    \mathrm{path} = \sum_t \lvert q_t - q_{t-1} \rvert, \quad
    \mathrm{span} = \max_t q_t - \min_t q_t
    $$

    Both are float64. The path depends on how often the curve was recorded: compare only
    paths of equal steps.

    Args:
        curve: values of shape (..., times, ...), such as a percentile at every
            evaluation.
        axis: the axis of the times.

    Returns:
        The path and the span, without the axis of the times.

    Examples:
        >>> path, span = movement([0.0, 2.0, 1.0, 1.0])
        >>> float(path), float(span)
        (3.0, 2.0)
    """
    values = np.asarray(curve, np.float64)
    path = np.abs(np.diff(values, axis=axis)).sum(axis=axis)
    return Movement(path, np.ptp(values, axis=axis))
