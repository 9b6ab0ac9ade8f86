"""A step of training and of evaluation, and the state they go through."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.data.sources import open_source
from bnjax.models import MLP, Normalization
from bnjax.training.program import Program
from bnjax.training.sharding import make_parallel
from bnjax.training.step import (
    Stream,
    create_state,
    make_eval_step,
    make_train_step,
    state_sha256,
    stream_key,
    topk_correct,
    tree_sha256,
)
from tests.training import numpy_network

RATE = 0.3
FAST = Normalization(momentum=0.75)


def batch(seed, examples=12, dtype=None, mean=0.5, std=1):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(mean, std, (examples, 4, 5)), dtype),
        "label": jnp.asarray(rng.integers(0, 3, examples)),
    }


def network(kind, dtype):
    normalization = Normalization(kind) if isinstance(kind, str) else kind
    return MLP(
        (7, 6), 3, weight_std=0.5, normalization=normalization, param_dtype=dtype
    )


def assert_close(found, expected, atol, rtol=None):
    rtol = atol if rtol is None else rtol
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        found,
        expected,
    )


def to_numpy(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
def test_steps_equal_numpys(kind, dtype, rtol, x64):
    model, optimizer = network(kind, dtype), optax.sgd(RATE)
    state = create_state(model, optimizer, 0, batch(0, dtype=dtype)["image"])
    params, stats = to_numpy(state.params), to_numpy(state.batch_stats)
    train_step = jax.jit(make_train_step(model, optimizer))
    for step in range(3):
        given = batch(step, dtype=dtype)
        state, metrics = train_step(state, given)
        loss, accuracy, gradients, stats = numpy_network.loss_and_gradients(
            params, stats, to_numpy(given["image"]), np.asarray(given["label"])
        )
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=rtol)
        np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=rtol)
    assert int(state.step) == 3
    assert state.params["logits"]["kernel"].dtype == dtype
    found, expected = (state.params, state.batch_stats), (params, stats)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected, rtol)


def test_the_step_is_pure():
    model, optimizer = network("batch", jnp.float32), optax.adam(0.1)
    given = batch(0)
    state = create_state(model, optimizer, 0, given["image"])
    before = to_numpy((state.params, state.batch_stats))
    train_step = jax.jit(make_train_step(model, optimizer))
    first, second = train_step(state, given), train_step(state, given)
    both = [(after.params, after.opt_state, found) for after, found in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    after = to_numpy((state.params, state.batch_stats))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("kind", ["batch", "none"])
def test_evaluation_equals_numpys(kind, x64):
    model = network(kind, jnp.float64)
    state = create_state(model, optax.sgd(0.1), 2, batch(0)["image"])
    given = batch(5, examples=9)
    metrics = jax.jit(make_eval_step(model))(state.params, state.batch_stats, given)
    variables = to_numpy((state.params, state.batch_stats))
    logits, _, _ = numpy_network.forward(*variables, given["image"], train=False)
    labels = np.asarray(given["label"])
    losses = -numpy_network.log_softmax(logits)[np.arange(9), labels]
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-12)
    np.testing.assert_array_equal(metrics["correct"], logits.argmax(-1) == labels)


def test_without_statistics_the_collection_is_empty():
    model, optimizer = network("none", jnp.float32), optax.sgd(0.1)
    state = create_state(model, optimizer, 0, batch(0)["image"])
    assert state.batch_stats == {}
    state, _ = jax.jit(make_train_step(model, optimizer))(state, batch(0))
    assert state.batch_stats == {}


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("classes", [3, 5, 6, 30])
def test_hits_are_those_of_a_stable_sort(array, classes):
    rng = np.random.default_rng(classes)
    # Whole numbers, so that there are many ties.
    scores = rng.integers(0, 6, (200, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 200)
    found = topk_correct(array(scores), array(labels))
    order = np.argsort(-scores, axis=-1, kind="stable")
    np.testing.assert_array_equal(found["correct"], scores.argmax(-1) == labels)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        among = (order[:, :5] == labels[:, None]).any(-1)
        np.testing.assert_array_equal(found["top5"], among)


def test_nan_is_never_right():
    scores = np.array([[np.nan, 1.0], [np.nan, 1.0], [np.nan, np.nan]])
    labels = np.array([0, 1, 0])
    for array in (np.asarray, jnp.asarray):
        found = topk_correct(array(scores), array(labels))
        assert found["correct"].tolist() == [False, False, False]


# Micro-batches: their gradients averaged, their statistics merged.


def wide_batch(dtype):
    return batch(1, 60, dtype, mean=2, std=3)


def step(accumulate, dtype, normalization=FAST, unroll=False):
    """Return the state before and after one step, and its metrics."""
    deferred = dataclasses.replace(normalization, deferred=accumulate > 1)
    optimizer, given = optax.sgd(RATE), wide_batch(dtype)
    state = create_state(network(FAST, dtype), optimizer, 0, given["image"])
    train_step = make_train_step(
        network(deferred, dtype),
        optimizer,
        accumulate=accumulate,
        unroll=unroll,
        updated_stats=deferred.updated_stats if accumulate > 1 else None,
    )
    return state, *jax.jit(train_step)(state, given)


def exact(state, dtype):
    """The mean gradients and each layer's values, over four times 15 in NumPy."""
    given = wide_batch(dtype)
    images = np.asarray(given["image"], np.float64).reshape(4, 15, 4, 5)
    labels = np.asarray(given["label"]).reshape(4, 15)
    params, stats = to_numpy((state.params, state.batch_stats))
    found = [
        numpy_network.loss_and_gradients(params, stats, *part)
        for part in zip(images, labels, strict=True)
    ]
    losses, accuracies, gradients, _ = zip(*found, strict=True)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *gradients)
    first = images.reshape(60, -1) @ params["dense_0"]["kernel"]
    return np.mean(losses), np.mean(accuracies), mean, first


@pytest.mark.slow
def test_written_out_they_are_the_same(x64):
    _, looped, expected = step(4, jnp.float64)
    _, written_out, found = step(4, jnp.float64, unroll=True)
    found = (written_out.params, written_out.batch_stats, found)
    expected = (looped.params, looped.batch_stats, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [pytest.param(jnp.float32, 1e-6, marks=pytest.mark.slow), (jnp.float64, 1e-12)],
)
def test_four_times_15_have_the_statistics_of_60(dtype, atol, x64):
    state, after, _ = step(4, dtype)
    _, _, _, values = exact(state, dtype)
    found = after.batch_stats["bn_0"]
    assert found["mean"].dtype == dtype
    mean, var = 0.25 * values.mean(0), 0.75 + 0.25 * values.var(0, ddof=1)
    assert_close((found["mean"], found["var"]), (mean, var), atol)


@pytest.mark.slow
def test_deeper_layers_have_the_merged_moments_of_their_micro_batches(x64):
    _, after, _ = step(4, jnp.float64)
    virtual = dataclasses.replace(FAST, virtual_batch_size=15)
    _, expected, _ = step(1, jnp.float64, virtual)
    for tree in ("params", "batch_stats"):
        assert_close(getattr(after, tree), getattr(expected, tree), 1e-12, rtol=0)


def test_gradients_and_metrics_are_means_over_micro_batches(x64):
    state, after, metrics = step(4, jnp.float64)
    loss, accuracy, gradients, _ = exact(state, jnp.float64)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-11)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-11)
    expected = jax.tree.map(lambda p, g: p - RATE * g, state.params, gradients)
    assert_close(after.params, expected, 1e-11, rtol=0)


def test_without_normalization_micro_batches_change_nothing(x64):
    optimizer, given = optax.sgd(RATE), wide_batch(jnp.float64)
    model = network("none", jnp.float64)
    state = create_state(model, optimizer, 0, given["image"])
    whole, _ = jax.jit(make_train_step(model, optimizer))(state, given)
    parts, _ = jax.jit(make_train_step(model, optimizer, accumulate=4))(state, given)
    assert parts.batch_stats == {}
    assert_close(parts.params, whole.params, 1e-12, rtol=0)


# The state.


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
        {"a": {"b": -jnp.zeros((2, 3))}},
        {"a": {"b": jnp.zeros((3, 2))}},
        {"a": {"c": jnp.zeros((2, 3))}},
        {"a": jnp.zeros((2, 3))},
        {"a": {"b": jnp.zeros((2, 3), jnp.int32)}},
        {"a": {"b": jnp.zeros((2, 3)), "c": jnp.zeros(0)}},
    ],
    ids=["value", "sign", "shape", "name", "path", "dtype", "leaf"],
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
    leaves = jax.tree.leaves((state.params, state.opt_state))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
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


@pytest.mark.slow
def test_half_precision_leaves_all_but_the_layers_in_float32(small_config):
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
    full = Program(small_config, open_source("digits"))
    train_step = full.train_step(make_parallel(small_config))
    expected, _ = jax.jit(train_step)(state, batch)
    found, wanted = (s.batch_stats["bn_0"]["mean"] for s in (after, expected))
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=1e-3)
    assert np.any(np.asarray(found) != np.asarray(wanted))
