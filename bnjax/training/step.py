"""The training step and the evaluation step, as pure functions."""

import dataclasses
import enum
import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.core import Tracer

from bnjax.data.sources import Arrays
from bnjax.functional import Moments
from bnjax.training.config import RunError
from bnjax.variants.ghost import MOMENTS, merge_stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a training step reads and writes.

    Attributes:
        step: the number of steps so far, int32, shape ().
        params: the weights, scale and bias of every layer.
        batch_stats: the running statistics; empty without batch normalization.
        opt_state: the state of the optimizer.
        rng: the random key of the run; it never changes, see `stream_key`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array


class Stream(enum.IntEnum):
    """Kinds of randomness in a run, each independent of the others."""

    INIT = 0
    ORDER = 1
    NOISE = 2
    AUGMENT = 3


def stream_key(rng: jax.Array, stream: Stream, index: jax.Array | int = 0) -> jax.Array:
    """Return the key of one draw, such as the order of an epoch or the noise of a step.

    It depends only on the run's key, the kind and the index, so that a run can be
    resumed at any step.
    """
    return jax.random.fold_in(jax.random.fold_in(rng, stream), index)


def check_memory(what: str, shapes: Any) -> None:
    """Refuse arrays that exceed the memory of this machine, before they are made.

    A configuration may come from a stranger and ask for any size.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise RunError(
            f"the network cannot be made: {what} take {needed:,} bytes, but this "
            f"machine has {memory:,} bytes of memory. Make --model.*, the images or "
            "the batch smaller; for an existing run, see its config.json."
        )


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    images: jax.Array,
) -> TrainState:
    """Return the state before the first step; every leaf is a separate array.

    The running statistics start with their dtype after a step: Flax makes them float32,
    and a step on float64 makes them float64, which a scan could not carry. `images` is
    an example batch, whose values are not used.
    """
    rng = jax.random.key(seed)

    # The program of a large network is long and runs once: on a CPU, LLVM would take
    # minutes to optimize it. A program that is only traced takes no such option.
    runs_on_cpu = jax.default_backend() == "cpu" and not isinstance(images, Tracer)
    options = {"xla_backend_optimization_level": 1} if runs_on_cpu else None

    @functools.partial(jax.jit, compiler_options=options)
    def init(rng: jax.Array, images: jax.Array) -> Any:
        return model.init(stream_key(rng, Stream.INIT), images, train=False)

    def step(variables: Any, images: jax.Array) -> Any:
        noise = {"dropout": jax.random.key(0)}
        return model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=noise
        )[1]

    check_memory("its variables", jax.eval_shape(init, rng, images))
    variables = init(rng, images)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    if batch_stats:
        # Two examples, because training cannot use one value per channel.
        two = jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype)
        after = jax.eval_shape(step, variables, two)["batch_stats"]
        batch_stats = jax.tree.map(
            lambda leaf, new: leaf.astype(new.dtype), batch_stats, after
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        rng=rng,
    )


def count_parameters(params: Any) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tree_sha256(tree: Any) -> str:
    """Return a digest of a tree: paths, shapes, dtypes and every bit of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def state_sha256(state: TrainState) -> str:
    """Return a digest of parameters, statistics and optimizer state to compare runs."""
    return tree_sha256((state.params, state.batch_stats, state.opt_state))


def layer_names(batch_stats: Any) -> tuple[str, ...]:
    """Return the layers that keep statistics, sorted by name."""
    return tuple(sorted({"/".join(path[:-1]) for path in flatten_dict(batch_stats)}))


def bad_layers(batch_stats: Any) -> jax.Array:
    """Return, for each of `layer_names`, whether a statistic is not finite."""
    layers = {name: [] for name in layer_names(batch_stats)}
    for path, leaf in flatten_dict(batch_stats).items():
        layers["/".join(path[:-1])].append(leaf)
    found = [~all_finite(leaves) for leaves in layers.values()]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


def all_finite(tree: Any) -> jax.Array:
    """Return whether every number of a tree is finite, a boolean of shape ()."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


Batch = dict[str, jax.Array]
Gather = Callable[[Arrays, jax.Array], Batch]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
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
    updated_stats: Callable[[Any, Any], Any] | None = None,
    skip_nonfinite: bool = False,
    unroll: bool = False,
) -> TrainStep:
    r"""Return `train_step(state, batch) -> (state, metrics)`.

    It takes one step of the optimizer on the mean cross-entropy of the batch,

    $$L = -\frac{1}{m} \sum_i \log \mathrm{softmax}(f(x_i))_{t_i},$$

    and updates the running statistics once.

    Args:
        model: a module that returns logits; its collection `batch_stats` is updated if
            it has one.
        optimizer: the optimizer of the parameters.
        axis_name: the axis of the enclosing pmap, in which each device has a part of
            the batch.
        accumulate: the number of micro-batches in a batch. Each is normalized by its
            own statistics, and the gradients are averaged.
        updated_stats: for a model that writes the collection "batch_moments", a
            function that returns the new `batch_stats` from the old and from each
            layer's Moments over the micro-batches and devices. None for a model that
            updates its statistics itself.
        skip_nonfinite: if the loss or a value of the new state is not finite, only
            count the step and keep parameters, statistics and optimizer state.
        unroll: unroll the loop over micro-batches; see `slow_in_loops`.

    Returns:
        A pure function of a `TrainState` and a batch of "image", shape (batch, ...)
        and floating, and "label", shape (batch,) and integer. Its metrics are the
        batch's mean "loss" and "accuracy" before the step, of shape (); `bad_layers`,
        all False if the loss is finite; and, with `skip_nonfinite`, whether the step
        was "dropped".

    References:
        Ioffe & Szegedy (2015), Algorithm 2, lines 1 to 6.
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
        """Return the means over the micro-batches, and their merged moments."""

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
            # These values are equal on every device, and so is the result.
            fine &= all_finite((new_state.params, batch_stats, opt_state))
            metrics["dropped"] = ~fine
            kept = jax.tree.map(
                lambda new, old: jnp.where(fine, new, old), new_state, state
            )
            new_state = dataclasses.replace(kept, step=state.step + 1)
        nothing = jnp.zeros(len(layer_names(batch_stats)), bool)
        metrics["bad_layers"] = jax.lax.cond(
            fine, lambda _: nothing, bad_layers, batch_stats
        )
        return new_state, metrics

    return train_step


def _merged(moments: Any) -> Any:
    """Merge each layer's Moments along the leading axis."""
    return jax.tree.map(
        merge_stacked, moments, is_leaf=lambda node: isinstance(node, Moments)
    )


def topk_correct(scores: Any, labels: Any) -> dict[str, Any]:
    """Return which examples are correct, and correct among the first five classes.

    If scores are equal, the lower class comes first, as for argmax. NaN is above all
    numbers, and an example whose own score is NaN is wrong.

    Args:
        scores: logits or probabilities, shape (batch, classes), of NumPy or JAX.
        labels: the classes, shape (batch,).

    Returns:
        "correct" and, if there are more than 5 classes, "top5", shape (batch,).
    """
    examples, classes = scores.shape
    own = scores[np.arange(examples), labels][:, None]
    later = labels[:, None] <= np.arange(classes)
    rank = (~((own > scores) | ((own == scores) & later))).sum(-1)
    top5 = {"top5": rank < 5} if classes > 5 else {}
    return {"correct": rank < 1, **top5}


def make_eval_step(model: nn.Module) -> EvalStep:
    """Return `eval_step(params, batch_stats, batch) -> metrics`, one for each example.

    The metrics are "loss" and the results of `topk_correct`, of shape (batch,). The
    caller must leave out padding from sums.
    """
    predict = make_predict_step(model)

    def eval_step(params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        logits = predict(params, batch_stats, batch)["logits"]
        labels = batch["label"]
        return {"loss": _cross_entropy(logits, labels), **topk_correct(logits, labels)}

    return eval_step


def make_predict_step(model: nn.Module) -> EvalStep:
    """Return `predict_step(params, batch_stats, batch) -> {"logits": ...}`."""

    def predict_step(params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = model.apply(variables, batch["image"], train=False)
        return {"logits": logits}

    return predict_step
