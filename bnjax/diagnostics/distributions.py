"""How the inputs of the nonlinearities are distributed, and how far that moves."""

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
    """How far a curve goes: the sum of its steps, and from lowest to highest."""

    path: np.ndarray
    span: np.ndarray


def nonlinearity_inputs(
    model: nn.Module, variables: Any, images: jax.Array, *, train: bool = False
) -> dict[str, jax.Array]:
    r"""Return what each nonlinearity of a network is given.

    .. math:: u = \mathrm{BN}(W z) \quad\text{or, without BN,}\quad u = W z + b

    Args:
        model: with a field `normalization`, as the models of `bnjax.models` have.
        variables: of the model.
        images: shape (batch, ...), floating.
        train: normalize by the statistics of these images, as a training step would;
            else by the running ones. The variables stay as they are.

    Returns:
        By the path of the normalization layer, such as "bn_0": arrays of shape
        (batch, ..., features). Under `jax.jit`, those left out cost nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import nonlinearity_inputs
        >>> from bnjax.models import MLP
        >>> x = jnp.linspace(-1, 1, 60).reshape(12, 5)
        >>> variables = MLP((4, 3)).init(jax.random.key(0), x, train=False)
        >>> found = nonlinearity_inputs(MLP((4, 3)), variables, x, train=True)
        >>> {name: u.shape for name, u in found.items()}
        {'bn_0': (12, 4), 'bn_1': (12, 3)}

    References:
        Ioffe and Szegedy 2015, section 3.2 (where BN stands) and Figure 1b, c.
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
    """Return percentiles of the input of each nonlinearity, a feature at a time.

    They are taken over the examples and, in feature maps, over the positions too, with
    linear interpolation. Names are those of the inputs, shapes (percentiles, features).

    Args:
        inputs: of `nonlinearity_inputs`, all or some of them: arrays of shape
            (batch, ..., features).
        percentiles: each from 0 to 100.

    Example:
        >>> import numpy as np
        >>> u = np.array([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]])
        >>> print(input_percentiles({"bn_0": u}, (0, 50))["bn_0"])
        [[ 0. 10.]
         [ 1. 20.]]

    References:
        Ioffe and Szegedy 2015, Figure 1b, c.
    """
    # NumPy's partition takes a sixth of the time of XLA's sort on a CPU.
    return {
        name: np.percentile(np.asarray(u).reshape(-1, u.shape[-1]), percentiles, axis=0)
        for name, u in inputs.items()
    }


def movement(curve: Any, axis: int = 0) -> Movement:
    r"""Return how far a curve moves, in the units of its values.

    .. math:: \mathrm{path} = \sum_t |q_t - q_{t-1}|, \quad
              \mathrm{span} = \max_t q_t - \min_t q_t

    Both are float64. The path depends on how often the curve was recorded: compare
    paths of equal steps alone.

    Args:
        curve: shape (..., times, ...), such as a percentile at every evaluation.
        axis: the times.

    Example:
        >>> path, span = movement([0.0, 2.0, 1.0, 1.0])
        >>> float(path), float(span)
        (3.0, 2.0)
    """
    values = np.asarray(curve, np.float64)
    path = np.abs(np.diff(values, axis=axis)).sum(axis=axis)
    return Movement(path, np.ptp(values, axis=axis))
