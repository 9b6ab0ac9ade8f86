"""One step of training and one of evaluation, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax.training.state import Stream, TrainState, stream_key

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, Batch], Metrics]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example, in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation
) -> TrainStep:
    r"""Return `train_step(state, batch) -> (state, metrics)`.

    It takes one step of the optimizer on the mean cross-entropy of the batch,

    .. math:: L = -\frac{1}{m} \sum_i \log \mathrm{softmax}(f(x_i))_{t_i},

    and one step of the running statistics.

    Args:
        model: gives logits; its `batch_stats` collection is updated where it has one.
        optimizer: of the parameters.

    Returns:
        A pure function of a `TrainState` and a batch of "image", shape (batch, ...)
        and floating, and "label", shape (batch,) and integer. Its metrics are the
        batch's mean "loss" and "accuracy" before the step, of shape ().

    References:
        Ioffe and Szegedy 2015, Algorithm 2, lines 1 to 6.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        noise = stream_key(state.rng, Stream.NOISE, state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": noise},
            )
            return _cross_entropy(logits, batch["label"]).mean(), (logits, updated)

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, updated)), gradients = gradient_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=updated.get("batch_stats", {}),
            opt_state=opt_state,
            rng=state.rng,
        )
        return new_state, {"loss": loss, "accuracy": correct.mean(dtype=loss.dtype)}

    return train_step


def make_eval_step(model: nn.Module) -> EvalStep:
    """Return `eval_step(params, batch_stats, batch) -> metrics`, each per example.

    Args:
        model: gives logits; normalizes by its running statistics here.

    Returns:
        A pure function whose metrics are "loss" and "correct" (boolean), of shape
        (batch,): whoever sums them leaves the padding out.
    """

    def eval_step(params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = model.apply(variables, batch["image"], train=False)
        return {
            "loss": _cross_entropy(logits, batch["label"]),
            "correct": jnp.argmax(logits, axis=-1) == batch["label"],
        }

    return eval_step
