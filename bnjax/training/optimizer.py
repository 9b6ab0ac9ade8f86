"""Optimizers and schedules of Optax, by their Optax names and keywords."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnjax._validate import did_you_mean, first_line
from bnjax.data.config import SettingError
from bnjax.training.config import Config, OptimizerConfig

OPTIMIZERS = {
    name: function
    for name, function in inspect.getmembers(optax, inspect.isfunction)
    if not name.startswith(("_", "scale_by_"))
    and next(iter(inspect.signature(function).parameters), "") == "learning_rate"
}
SCHEDULES = {
    name: function
    for name, function in inspect.getmembers(optax.schedules, inspect.isfunction)
    if inspect.signature(function).return_annotation == optax.Schedule
}
# Ranges of keywords whose other values Optax silently interprets as something else.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("momentum", "b1", "b2", "b3", "decay"),
        (lambda x: x is None or 0 <= x < 1, "a number in [0, 1)"),
    ),
    **dict.fromkeys(
        ("eps", "decay_rate", "transition_steps", "decay_steps"),
        (lambda x: x is not None and x > 0, "a positive number"),
    ),
}


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0."""
    optim, rate = config.optim, config.learning_rate
    warmup, left = optim.warmup_steps, config.steps - optim.warmup_steps
    options = optim.schedule_options
    if optim.schedule.startswith("piecewise"):
        drops = options.get("boundaries_and_scales")
        steps = drops if isinstance(drops, dict) else {}
        if not steps or not all(isinstance(t, int) and t > 0 for t in steps):
            raise SettingError(
                f"--optim.schedule-options boundaries_and_scales={drops}: expected "
                "steps and their factors, such as "
                "'boundaries_and_scales={30000: 0.1, 60000: 0.1}'."
            )
        # Here steps count from the start of the run, in Optax from the warm-up's end.
        moved = {step - warmup: factor for step, factor in steps.items()}
        options = {**options, "boundaries_and_scales": moved}
    ours = dict.fromkeys(("value", "init_value", "peak_value"), rate)
    ours |= {"end_value": 0.0, "transition_steps": left, "decay_steps": left}
    after = _call("schedule", optim, options, ours)
    if warmup == 0:
        return after
    # The warm-up starts above zero, so that every step has an effect.
    rising = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return the optimizer, with the learning rate of `make_schedule`.

    It first clips gradients by their global norm, before any weight decay. With
    `config.ema` it keeps an average of the parameters.
    """
    optim = config.optim
    ours = {"learning_rate": make_schedule(config), "weight_decay": optim.weight_decay}
    ours |= dict.fromkeys(("mask", "weight_decay_mask", "trust_ratio_mask"), decayed)
    chain = [_call("name", optim, optim.options, ours)]
    own_decay = "weight_decay" in inspect.signature(OPTIMIZERS[optim.name]).parameters
    if optim.weight_decay and not own_decay:
        # This adds the gradient of an L2 penalty.
        chain.insert(0, optax.add_decayed_weights(optim.weight_decay, mask=decayed))
    if optim.clip_norm is not None:
        chain.insert(0, optax.clip_by_global_norm(optim.clip_norm))
    optimizer = optax.chain(*chain) if len(chain) > 1 else chain[0]
    params = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    try:
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    except Exception as error:
        raise _failed("name", optim.name, optim.options, error) from error
    return optimizer if config.ema is None else keep_average(optimizer, config.ema)


def _call(
    field: str,
    optim: OptimizerConfig,
    options: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> Any:
    """Call an Optax function with the user's options and the defaults `ours`.

    An optimizer gets the defaults that it takes, a schedule those that it requires.
    """
    functions, flag = {
        "name": (OPTIMIZERS, "--optim.options"),
        "schedule": (SCHEDULES, "--optim.schedule-options"),
    }[field]
    name = getattr(optim, field)
    if name not in functions:
        raise SettingError(
            f"--optim.{field} {name}: Optax has no such function."
            f"{did_you_mean(name, functions)} Expected one of "
            f"{', '.join(sorted(functions))}."
        )
    parameters = inspect.signature(functions[name]).parameters
    keywords = [n for n in parameters if n != "learning_rate"]
    for given, value in options.items():
        if given not in keywords:
            raise SettingError(
                f"{flag} {given}: {name} has no such keyword."
                f"{did_you_mean(given, keywords)} "
                f"It has {', '.join(keywords) or 'none'}."
            )
        accepts, expected = _RANGES.get(given, (None, ""))
        if accepts and not (isinstance(value, int | float | None) and accepts(value)):
            raise SettingError(f"{flag} {given}={value}: expected {expected}.")
    required = [n for n, p in parameters.items() if p.default is p.empty]
    ours_to_give = parameters if field == "name" else required
    filled = {**{n: ours[n] for n in ours_to_give if n in ours}, **options}
    if missing := [n for n in required if n not in filled]:
        raise SettingError(
            f"--optim.{field} {name} needs {', '.join(missing)}: add "
            f"{flag} {missing[0]}=VALUE."
        )
    try:
        return functions[name](**filled)
    except Exception as error:
        raise _failed(field, name, options, error) from error


def _failed(
    field: str, name: str, options: Mapping[str, Any], error: Exception
) -> SettingError:
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    return SettingError(
        f"--optim.{field} {name}({given}) fails: {first_line(error)}. Expected one "
        "that needs only gradients, parameters and a schedule, and valid values of its "
        "keywords."
    )


def decayed(params: Any) -> Any:
    """Return which parameters have weight decay: all except biases and BN's scale.

    The name decides, not the rank: stacked and grouped layers have scales and biases of
    two and more dimensions.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            jax.tree_util.keystr(path[-1:], simple=True) not in ("bias", "scale")
        ),
        params,
    )


class AveragedState(NamedTuple):
    """The state of an optimizer, and the average of the parameters, started at zero."""

    inner: optax.OptState
    average: optax.EmaState


def keep_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    r"""Return an optimizer that also averages the updated parameters.

    After step $t$ the average is

    $$\bar\theta_t = \frac{1 - d}{1 - d^t} \sum_{i=1}^t d^{t-i} \theta_i,$$

    and the decay $d$ is the weight of the old average.
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
    """Return the average after at least one step, corrected for its start at zero."""
    return optax.tree.bias_correction(state.average.ema, decay, state.average.count)
