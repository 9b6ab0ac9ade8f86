"""Optimizers and learning-rate schedules by name; optax builds each."""

from collections.abc import Callable

import optax

from bnjax.training.config import Config

_SCHEDULES: dict[str, Callable[[Config], optax.Schedule]] = {
    "constant": lambda c: optax.constant_schedule(c.learning_rate),
    "exponential": lambda c: optax.exponential_decay(
        c.learning_rate, c.optim.decay_steps, c.optim.decay_rate, staircase=True
    ),
    "cosine": lambda c: optax.cosine_decay_schedule(c.learning_rate, c.steps),
}

_OPTIMIZERS: dict[
    str, Callable[[Config, optax.Schedule], optax.GradientTransformation]
] = {
    "sgd": lambda _, schedule: optax.sgd(schedule),
    "momentum": lambda c, schedule: optax.sgd(schedule, momentum=c.optim.momentum),
    "adam": lambda _, schedule: optax.adam(schedule),
}


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    Example:
        >>> from bnjax.training.config import Config, OptimizerConfig
        >>> halving = OptimizerConfig(
        ...     schedule="exponential", decay_rate=0.5, decay_steps=10
        ... )
        >>> config = Config(steps=30, batch_size=8, learning_rate=0.8, optim=halving)
        >>> [round(float(make_schedule(config)(step)), 3) for step in (0, 9, 10, 20)]
        [0.8, 0.8, 0.4, 0.2]
    """
    return _SCHEDULES[config.optim.schedule](config)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return the optimizer that follows `make_schedule`'s learning rate."""
    return _OPTIMIZERS[config.optim.name](config, make_schedule(config))
