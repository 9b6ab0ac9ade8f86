"""How steps are laid out on devices: today many in one dispatch, on one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from bnjax.data.resident import Arrays
from bnjax.training.state import TrainState
from bnjax.training.step import Batch, EvalStep, Metrics, TrainStep

Gather = Callable[[Arrays, jax.Array], Batch]


def make_train_steps(train_step: TrainStep, gather: Gather) -> jax.stages.Wrapped:
    """Return a jitted function that takes one step for each row of indices.

    Args:
        train_step: one step.
        gather: the batch of some rows of the resident arrays.

    Returns:
        `train_steps(state, arrays, indices) -> (state, metrics)`. The state given is
        donated: its buffers are those of the state returned. Indices have shape
        (steps, batch), each metric (steps,).
    """

    def train_steps(
        state: TrainState, arrays: Arrays, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
            return train_step(state, gather(arrays, rows))

        return jax.lax.scan(body, state, indices)

    return jax.jit(train_steps, donate_argnums=0)


def make_eval_steps(eval_step: EvalStep, gather: Gather) -> jax.stages.Wrapped:
    """Return a jitted function that evaluates each row of indices.

    Returns:
        `eval_steps(params, batch_stats, arrays, indices) -> metrics`, each metric of
        the shape of the indices.
    """

    @jax.jit
    def eval_steps(
        params: Any, batch_stats: Any, arrays: Arrays, indices: jax.Array
    ) -> Metrics:
        step = functools.partial(eval_step, params, batch_stats)
        return jax.lax.map(lambda rows: step(gather(arrays, rows)), indices)

    return eval_steps
