"""What training carries from one step to the next."""

import dataclasses
import enum
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes.

    Args:
        step: steps taken, int32, shape ().
        params: weights, scale and bias of every layer.
        batch_stats: running statistics; empty without batch normalization.
        opt_state: the optimizer's.
        rng: the run's random key; it never changes, see `stream_key`.
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
    """Return the key of one draw: the epoch's order, the step's noise.

    It depends on the run's key, the kind and the index alone, so that a run can be
    taken up again at any step.
    """
    return jax.random.fold_in(jax.random.fold_in(rng, stream), index)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    images: jax.Array,
) -> TrainState:
    """Return the state before the first step.

    Args:
        model: called as `model(images, train=False)`; shares no statistics.
        optimizer: gives the optimizer's state.
        seed: of the run's key.
        images: an example batch, shape (batch, ...); its values are not used.

    The running statistics start in the dtype that a step gives them: Flax makes them
    float32, and a step on float64 makes them float64, which no scan could carry.

    Returns:
        A state whose every leaf is an array of its own.
    """
    rng = jax.random.key(seed)

    @jax.jit
    def init(rng: jax.Array, images: jax.Array) -> Any:
        return model.init(stream_key(rng, Stream.INIT), images, train=False)

    variables = init(rng, images)
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    if batch_stats:
        batch_stats = _as_after_a_step(model, variables, images)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        rng=rng,
    )


def _as_after_a_step(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """Return the running statistics in the dtypes that training gives them."""

    def step(variables: Any, images: jax.Array) -> Any:
        key = jax.random.key(0)
        return model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )[1]

    # Two examples: one value per channel is none to train on.
    two = jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype)
    after = jax.eval_shape(step, variables, two)["batch_stats"]
    return jax.tree.map(
        lambda leaf, new: leaf.astype(new.dtype), variables["batch_stats"], after
    )


def count_parameters(params: Any) -> int:
    """Return how many numbers `params` holds.

    Example:
        >>> count_parameters({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
        16
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tree_sha256(tree: Any) -> str:
    """Digest a tree: paths, shapes, dtypes and every bit of every leaf.

    Example:
        >>> a = tree_sha256({"mean": jnp.zeros(3), "var": jnp.ones(3)})
        >>> a == tree_sha256({"var": jnp.ones(3), "mean": jnp.zeros(3)})
        True
        >>> a == tree_sha256({"mean": -jnp.zeros(3), "var": jnp.ones(3)})
        False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def state_sha256(state: TrainState) -> str:
    """Digest parameters, statistics and optimizer state: equal runs have equal ones."""
    return tree_sha256((state.params, state.batch_stats, state.opt_state))
