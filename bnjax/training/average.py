"""A moving average of the parameters, kept in the optimizer's state."""

from typing import Any, NamedTuple

import optax


class AveragedState(NamedTuple):
    """The state of an optimizer that keeps an average.

    Args:
        inner: the optimizer's own.
        average: of the parameters after each step, from zero.
    """

    inner: optax.OptState
    average: optax.EmaState


def keep_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    r"""Return the same optimizer, which also averages the parameters it leads to.

    After step t the average is

    .. math:: \bar\theta_t = \frac{1 - d}{1 - d^t} \sum_{i=1}^t d^{t-i} \theta_i,

    Args:
        optimizer: whose updates stay as they are.
        decay: d, the weight of the old average.
    """
    ema = optax.ema(decay)

    def init(params: optax.Params) -> AveragedState:
        average: Any = ema.init(params)
        return AveragedState(optimizer.init(params), average)

    def update(
        updates: optax.Updates, state: Any, params: Any = None
    ) -> tuple[optax.Updates, AveragedState]:
        updates, inner = optimizer.update(updates, state.inner, params)
        new: Any = optax.apply_updates(params, updates)
        _, average = ema.update(new, state.average)
        return updates, AveragedState(inner, average)  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformation(init, update)


def average_of(state: AveragedState, decay: float) -> Any:
    """Return the average, free of the zero that it starts from.

    Args:
        state: of an optimizer made by `keep_average`, after one step or more.
        decay: as given there.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = keep_average(optax.sgd(1.0), decay=0.5)
        >>> params = jnp.array(8.0)
        >>> state = optimizer.init(params)
        >>> for gradient in (2.0, 6.0):
        ...     updates, state = optimizer.update(jnp.array(gradient), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params, average_of(state, decay=0.5))  # (0.25 * 6 + 0.5 * 0) / 0.75
        0.0 2.0
    """
    return optax.tree.bias_correction(state.average.ema, decay, state.average.count)
