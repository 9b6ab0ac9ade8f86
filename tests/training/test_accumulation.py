"""Micro-batches: their gradients averaged, their statistics merged."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.models import MLP, Normalization
from bnjax.training.step import create_state, make_train_step
from tests.training import numpy_network

PLAIN = Normalization(momentum=0.75)


def network(normalization, dtype):
    return MLP(
        (7, 6), 3, weight_std=0.5, normalization=normalization, param_dtype=dtype
    )


def batch(dtype, examples=60):
    rng = np.random.default_rng(1)
    return {
        "image": jnp.asarray(rng.normal(2, 3, (examples, 4, 5)), dtype),
        "label": jnp.asarray(rng.integers(0, 3, examples)),
    }


def step(accumulate, dtype, normalization=PLAIN, unroll=False):
    """Return the state before and after one step, and its metrics."""
    deferred = dataclasses.replace(normalization, deferred=accumulate > 1)
    optimizer, given = optax.sgd(0.3), batch(dtype)
    state = create_state(network(PLAIN, dtype), optimizer, 0, given["image"])
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
    given = batch(dtype)
    images = np.asarray(given["image"], np.float64).reshape(4, 15, 4, 5)
    labels = np.asarray(given["label"]).reshape(4, 15)
    params, stats = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        for tree in (state.params, state.batch_stats)
    )
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
    chex.assert_trees_all_close(
        (written_out.params, written_out.batch_stats, found),
        (looped.params, looped.batch_stats, expected),
        rtol=1e-13,
        atol=1e-14,
    )


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-6), (jnp.float64, 1e-12)])
def test_four_times_15_have_the_statistics_of_60(dtype, atol, x64):
    state, after, _ = step(4, dtype)
    _, _, _, values = exact(state, dtype)
    found = after.batch_stats["bn_0"]
    assert found["mean"].dtype == dtype
    expected = 0.25 * values.mean(0), 0.75 + 0.25 * values.var(0, ddof=1)
    np.testing.assert_allclose(found["mean"], expected[0], rtol=atol, atol=atol)
    np.testing.assert_allclose(found["var"], expected[1], rtol=atol, atol=atol)


def test_deeper_layers_have_the_merged_moments_of_their_micro_batches(x64):
    _, after, _ = step(4, jnp.float64)
    virtual = dataclasses.replace(PLAIN, virtual_batch_size=15)
    _, expected, _ = step(1, jnp.float64, virtual)
    for a, b in zip(
        jax.tree.leaves((after.params, after.batch_stats)),
        jax.tree.leaves((expected.params, expected.batch_stats)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_gradients_and_metrics_are_means_over_micro_batches(x64):
    state, after, metrics = step(4, jnp.float64)
    loss, accuracy, gradients, _ = exact(state, jnp.float64)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-11)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-11)
    expected = jax.tree.map(lambda p, g: p - 0.3 * g, state.params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
        after.params,
        expected,
    )


def test_without_normalization_micro_batches_change_nothing(x64):
    none = Normalization("none")
    optimizer, given = optax.sgd(0.3), batch(jnp.float64)
    model = network(none, jnp.float64)
    state = create_state(model, optimizer, 0, given["image"])
    whole, _ = jax.jit(make_train_step(model, optimizer))(state, given)
    parts, _ = jax.jit(make_train_step(model, optimizer, accumulate=4))(state, given)
    assert parts.batch_stats == {}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        parts.params,
        whole.params,
    )
