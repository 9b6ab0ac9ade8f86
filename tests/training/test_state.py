import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.data.sources import open_source
from bnjax.models import MLP
from bnjax.training.program import Program
from bnjax.training.sharding import make_parallel
from bnjax.training.step import (
    Stream,
    create_state,
    make_train_step,
    state_sha256,
    stream_key,
    tree_sha256,
)


@pytest.fixture(scope="module")
def state():
    return create_state(MLP((5,), 3), optax.adam(0.1), 7, jnp.zeros((1, 4)))


def key_of(*args):
    return tuple(np.asarray(jax.random.key_data(stream_key(jax.random.key(0), *args))))


def test_each_draw_has_a_key_of_its_own():
    draws = [(stream, index) for stream in Stream for index in range(5)]
    assert len({key_of(*draw) for draw in draws}) == len(draws)
    assert key_of(Stream.ORDER, 3) == key_of(Stream.ORDER, 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": {"b": jnp.zeros((2, 3)).at[1, 2].set(1e-45)}},
        {"a": {"b": jnp.zeros((3, 2))}},
        {"a": {"c": jnp.zeros((2, 3))}},
        {"a": jnp.zeros((2, 3))},
        {"a": {"b": jnp.zeros((2, 3), jnp.int32)}},
        {"a": {"b": jnp.zeros((2, 3)), "c": jnp.zeros(0)}},
    ],
    ids=["value", "shape", "name", "path", "dtype", "leaf"],
)
def test_the_digest_sees(changed):
    tree = {"a": {"b": jnp.zeros((2, 3))}}
    assert tree_sha256(tree) == tree_sha256(jax.tree.map(np.asarray, tree))
    assert tree_sha256(tree) != tree_sha256(changed)


def test_the_states_digest_covers_parameters_statistics_and_optimizer(state):
    digest = state_sha256(state)
    for name in ("params", "batch_stats", "opt_state"):
        moved = jax.tree.map(lambda leaf: leaf + 1, getattr(state, name))
        assert state_sha256(dataclasses.replace(state, **{name: moved})) != digest
    assert state_sha256(dataclasses.replace(state, step=state.step + 1)) == digest


def test_seeds_give_other_weights(state):
    def create(seed):
        return create_state(MLP((5,), 3), optax.adam(0.1), seed, jnp.zeros((1, 4)))

    assert state_sha256(create(7)) == state_sha256(state)
    assert state_sha256(create(8)) != state_sha256(state)


def test_every_leaf_can_be_donated(state):
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)]
    buffers += [
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.opt_state)
    ]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_statistics_start_in_the_dtype_that_training_gives_them(dtype, x64):
    model, optimizer = MLP((5,), 3, param_dtype=dtype), optax.sgd(0.1)
    state = create_state(model, optimizer, 0, jnp.zeros((1, 4), dtype))
    train_step = make_train_step(model, optimizer)
    batch = {"image": jnp.ones((4, 4), dtype), "label": jnp.zeros(4, jnp.int32)}
    after, _ = jax.lax.scan(lambda s, _: train_step(s, batch), state, length=2)
    for leaf in jax.tree.leaves((state.batch_stats, after.batch_stats)):
        assert leaf.dtype == dtype


def test_half_precision_leaves_parameters_statistics_and_losses_in_float32(
    small_config,
):
    config = dataclasses.replace(small_config, dtype="bfloat16")
    program = Program(config, open_source("digits"))
    state = program.initial_state()
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.random((50, 8, 8)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, 50)),
    }
    logits, seen = program.model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        batch["image"],
        train=False,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    assert seen["intermediates"]["bn_0"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    train_step = program.train_step(make_parallel(config))
    after, metrics = jax.jit(train_step)(state, batch)
    del metrics["bad_layers"]
    floating = (after.params, after.batch_stats, metrics)
    assert {leaf.dtype for leaf in jax.tree.leaves(floating)} == {jnp.dtype("float32")}
    full = Program(small_config, open_source("digits")).train_step(
        make_parallel(small_config)
    )
    expected, _ = jax.jit(full)(state, batch)
    found, wanted = (
        after.batch_stats["bn_0"]["mean"],
        expected.batch_stats["bn_0"]["mean"],
    )
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=1e-3)
    assert np.any(np.asarray(found) != np.asarray(wanted))
