"""One step of training and one of evaluation, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax.data.resident import Arrays
from bnjax.functional import Moments
from bnjax.training.nonfinite import all_finite, bad_layers, layer_names
from bnjax.training.state import Stream, TrainState, stream_key
from bnjax.variants.ghost import MOMENTS, merge_stacked

Batch = dict[str, jax.Array]
Gather = Callable[[Arrays, jax.Array], Batch]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
UpdatedStats = Callable[[Any, Any], Any]
EvalStep = Callable[[Any, Any, Batch], Metrics]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example, in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    accumulate: int = 1,
    updated_stats: UpdatedStats | None = None,
    skip_nonfinite: bool = False,
    unroll: bool = False,
) -> TrainStep:
    r"""Return `train_step(state, batch) -> (state, metrics)`.

    It takes one step of the optimizer on the mean cross-entropy of the batch,

    .. math:: L = -\frac{1}{m} \sum_i \log \mathrm{softmax}(f(x_i))_{t_i},

    and one step of the running statistics.

    Args:
        model: gives logits; its `batch_stats` collection is updated where it has one.
        optimizer: of the parameters.
        axis_name: of the enclosing pmap, whose devices have a part of the batch each.
        accumulate: micro-batches that the batch is cut into. Gradients are their mean;
            each is normalized by its own statistics.
        updated_stats: gives the new `batch_stats` from the old and from each layer's
            Moments over the micro-batches and devices, for a model that writes them to
            the collection "batch_moments". None for one that updates its statistics
            itself.
        skip_nonfinite: where the loss, or anything in the new state, is not finite,
            only count the step: parameters, statistics and optimizer state stay.
        unroll: write the micro-batches out one after the other; see `slow_in_loops`.

    Returns:
        A pure function of a `TrainState` and a batch of "image", shape (batch, ...)
        and floating, and "label", shape (batch,) and integer. Its metrics are the
        batch's mean "loss" and "accuracy" before the step, of shape ();
        "bad_layers", see `nonfinite`, all False where the loss is finite; and, with
        `skip_nonfinite`, whether the step was "dropped".

    References:
        Ioffe and Szegedy 2015, Algorithm 2, lines 1 to 6.
    """
    mutable = ["batch_stats"] if updated_stats is None else ["batch_stats", MOMENTS]

    def differentiate(
        state: TrainState, batch: Batch, noise: jax.Array
    ) -> tuple[Any, Metrics, Any]:
        """Return the gradients, the metrics, and the collections of the model."""

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mutable=mutable,
                rngs={"dropout": noise},
            )
            return _cross_entropy(logits, batch["label"]).mean(), (logits, updated)

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, updated)), gradients = gradient_fn(state.params)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        metrics = {"loss": loss, "accuracy": correct.mean(dtype=loss.dtype)}
        return gradients, metrics, updated

    def differentiate_parts(
        state: TrainState, batch: Batch, noise: jax.Array
    ) -> tuple[Any, Metrics, Any]:
        """Return the means over the micro-batches, and their joined moments."""

        def body(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
            index, micro_batch = part
            key = jax.random.fold_in(noise, index)
            gradients, *rest = differentiate(state, micro_batch, key)
            return jax.tree.map(jnp.add, total, gradients), rest

        parts = jax.tree.map(
            lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch
        )
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, (metrics, updated) = jax.lax.scan(
            body, zeros, (jnp.arange(accumulate), parts), unroll=unroll or 1
        )
        gradients = jax.tree.map(lambda leaf: leaf / accumulate, total)
        metrics = jax.tree.map(lambda leaf: leaf.mean(0), metrics)
        return gradients, metrics, {MOMENTS: _merged(updated.get(MOMENTS, {}))}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        noise = stream_key(state.rng, Stream.NOISE, state.step)
        if axis_name is not None:
            noise = jax.random.fold_in(noise, jax.lax.axis_index(axis_name))
        take = differentiate if accumulate == 1 else differentiate_parts
        gradients, metrics, updated = take(state, batch, noise)
        if axis_name is not None:
            gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
        batch_stats = updated.get("batch_stats", {})
        if updated_stats is not None:
            moments = updated.get(MOMENTS, {})
            if axis_name is not None:
                moments = _merged(jax.lax.all_gather(moments, axis_name))
            batch_stats = updated_stats(state.batch_stats, moments)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            rng=state.rng,
        )
        fine = jnp.isfinite(metrics["loss"])
        if skip_nonfinite:
            # All that it reads is the same on every device, and so is the answer.
            fine &= all_finite((new_state.params, batch_stats, opt_state))
            metrics["dropped"] = ~fine
            new_state = _chosen(fine, new_state, state)
        nothing = jnp.zeros(len(layer_names(batch_stats)), bool)
        metrics["bad_layers"] = jax.lax.cond(
            fine, lambda _: nothing, bad_layers, batch_stats
        )
        return new_state, metrics

    return train_step


def _chosen(fine: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return the new state, or the old one a step later."""
    params, batch_stats, opt_state = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old),
        (new.params, new.batch_stats, new.opt_state),
        (old.params, old.batch_stats, old.opt_state),
    )
    return TrainState(new.step, params, batch_stats, opt_state, new.rng)


def _merged(moments: Any) -> Any:
    """Join each layer's Moments along the leading axis."""
    return jax.tree.map(
        merge_stacked, moments, is_leaf=lambda node: isinstance(node, Moments)
    )


def hits(scores: Any, labels: Any) -> dict[str, Any]:
    """Say which examples are classified right, and right among the first five.

    Of equal scores the lower class comes first, as for argmax. NaN beats all others,
    and an example whose own score is NaN is wrong.

    Args:
        scores: logits or probabilities, shape (batch, classes), of NumPy or of JAX.
        labels: integers, shape (batch,).

    Returns:
        "correct" and, where there are more than 5 classes, "top5": booleans of shape
        (batch,).

    Example:
        >>> import numpy as np
        >>> hits(np.array([[1.0, 3.0, 3.0]] * 3), np.arange(3))["correct"].tolist()
        [False, True, False]
    """
    examples, classes = scores.shape
    own = scores[np.arange(examples), labels][:, None]
    later = labels[:, None] <= np.arange(classes)
    rank = (~((own > scores) | ((own == scores) & later))).sum(-1)
    top5 = {"top5": rank < 5} if classes > 5 else {}
    return {"correct": rank < 1, **top5}


def make_eval_step(model: nn.Module) -> EvalStep:
    """Return `eval_step(params, batch_stats, batch) -> metrics`, each per example.

    Args:
        model: gives logits; normalizes by its running statistics here.

    Returns:
        A pure function whose metrics are "loss" and those of `hits`, of shape (batch,):
        whoever sums them leaves the padding out.
    """
    predict = make_predict_step(model)

    def eval_step(params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        logits = predict(params, batch_stats, batch)["logits"]
        labels = batch["label"]
        return {"loss": _cross_entropy(logits, labels), **hits(logits, labels)}

    return eval_step


def make_predict_step(model: nn.Module) -> EvalStep:
    """Return `predict_step(params, batch_stats, batch) -> {"logits": ...}`.

    Args:
        model: gives logits; normalizes by its running statistics here.

    Returns:
        A pure function whose logits have the shape (batch, classes).
    """

    def predict_step(params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = model.apply(variables, batch["image"], train=False)
        return {"logits": logits}

    return predict_step
