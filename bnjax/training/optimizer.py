"""Optimizers and learning-rate schedules by name; optax builds each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from bnjax.training.config import Config


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


UNDECAYED = frozenset({"bias", "scale"})

# After the warm-up: each takes the configuration and the steps that are left.
_SCHEDULES: dict[str, Callable[[Config, int], optax.Schedule]] = {
    "constant": lambda c, _: optax.constant_schedule(c.learning_rate),
    "exponential": lambda c, _: optax.exponential_decay(
        c.learning_rate,
        c.optim.decay_steps,
        c.optim.decay_rate,
        staircase=c.optim.staircase,
    ),
    "cosine": lambda c, left: optax.cosine_decay_schedule(c.learning_rate, left),
    "step": lambda c, _: optax.piecewise_constant_schedule(
        c.learning_rate,
        {
            boundary - c.optim.warmup_steps: c.optim.decay_rate
            for boundary in c.optim.boundaries
        },
    ),
    "linear": lambda c, left: optax.linear_schedule(c.learning_rate, 0.0, left),
}

_Rule = Callable[[Config, optax.Schedule], optax.GradientTransformation]

# Weight decay comes before the rule, as the gradient of an L2 penalty.
_COUPLED: dict[str, _Rule] = {
    "sgd": lambda _, rate: optax.sgd(rate),
    "momentum": lambda c, rate: optax.sgd(rate, momentum=c.optim.momentum),
    "nesterov": lambda c, rate: optax.sgd(
        rate, momentum=c.optim.momentum, nesterov=True
    ),
    "adagrad": lambda c, rate: optax.adagrad(rate, eps=c.optim.epsilon),
    "rmsprop": lambda c, rate: optax.rmsprop(
        rate, decay=c.optim.rms_decay, eps=c.optim.epsilon
    ),
    "adam": lambda c, rate: optax.adam(
        rate, b1=c.optim.beta1, b2=c.optim.beta2, eps=c.optim.epsilon
    ),
}

# The rule has a weight decay of its own.
_OWN_DECAY: dict[str, _Rule] = {
    "adamw": lambda c, rate: optax.adamw(
        rate,
        b1=c.optim.beta1,
        b2=c.optim.beta2,
        eps=c.optim.epsilon,
        weight_decay=c.optim.weight_decay,
        mask=decayed,
    ),
    "lamb": lambda c, rate: optax.lamb(
        rate,
        b1=c.optim.beta1,
        b2=c.optim.beta2,
        eps=c.optim.epsilon,
        weight_decay=c.optim.weight_decay,
        mask=decayed,
    ),
    "lars": lambda c, rate: optax.lars(
        rate,
        weight_decay=c.optim.weight_decay,
        weight_decay_mask=decayed,
        trust_ratio_mask=decayed,
        momentum=c.optim.momentum,
    ),
}


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    Example:
        >>> from bnjax.training.config import Config, OptimizerConfig
        >>> halving = OptimizerConfig(
        ...     schedule="exponential", decay_rate=0.5, decay_steps=10, warmup_steps=4
        ... )
        >>> config = Config(steps=30, batch_size=8, learning_rate=0.8, optim=halving)
        >>> [round(float(make_schedule(config)(t)), 3) for t in (0, 1, 3, 4, 13, 14)]
        [0.2, 0.4, 0.8, 0.8, 0.8, 0.4]
    """
    warmup, rate = config.optim.warmup_steps, config.learning_rate
    after = _SCHEDULES[config.optim.schedule](config, config.steps - warmup)
    if warmup == 0:
        return after
    # It starts above zero: no step is without effect.
    rising = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return the optimizer that follows `make_schedule`'s learning rate.

    Gradients are clipped by their global norm first, before any weight decay. With
    `config.ema` it keeps an average of the parameters.
    """
    schedule, optim = make_schedule(config), config.optim
    chain = []
    if optim.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(optim.clip_norm))
    if optim.weight_decay and optim.name in _COUPLED:
        chain.append(optax.add_decayed_weights(optim.weight_decay, mask=decayed))
    rule = (_COUPLED | _OWN_DECAY)[optim.name](config, schedule)
    optimizer = optax.chain(*chain, rule) if chain else rule
    return optimizer if config.ema is None else keep_average(optimizer, config.ema)


def decayed(params: Any) -> Any:
    """Return which parameters weight decay reaches: not biases, nor BN's scale.

    The name decides and not the rank: stacked and grouped layers have scales and
    biases of two dimensions and more.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = {"kernel": jnp.ones((4, 3, 2)), "bias": jnp.ones((4, 2))}
        >>> decayed({"dense": layer, "bn": {"scale": jnp.ones((4, 2))}})
        {'bn': {'scale': False}, 'dense': {'bias': False, 'kernel': True}}
    """

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in UNDECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, params)
