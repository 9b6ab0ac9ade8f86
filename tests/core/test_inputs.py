"""Inputs at the edge: a rank of 1, no rows, complex values; and leaks of tracers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(16, 4)) * 2 + 3)
STATS = bnjax.BatchStats(jnp.full(4, 0.5), jnp.full(4, 2.0))


def double(z):
    return 2 * z


# Activation, mask and residual.
LEAK_CASES = [
    ("relu", False, False),
    (double, True, True),
]


@pytest.mark.parametrize(
    "axis_name", [None, pytest.param("batch", marks=pytest.mark.slow)]
)
def test_no_tracer_leaks(axis_name):
    for activation, masked, with_residual in LEAK_CASES:

        def loss(x, activation=activation, masked=masked, added=with_residual):
            y, _ = bnjax.batch_norm(
                x,
                jnp.ones(4),
                jnp.zeros(4),
                STATS,
                activation=activation,
                axis_name=axis_name,
                mask=jnp.ones((x.shape[0], 1)) if masked else None,
                residual=2 * x if added else None,
            )
            return jnp.sum(jnp.square(y))

        with jax.checking_leaks():
            if axis_name is None:
                gradient = jax.jit(jax.grad(loss))(X)
            else:
                shards = X.reshape(4, 4, 4)
                gradient = jax.vmap(jax.grad(loss), axis_name=axis_name)(shards)
        assert np.isfinite(gradient).all()


def test_one_example_a_device():
    """Training on examples of rank 1, as flax.linen takes them."""

    def train(layers):
        layer = layers.BatchNorm(use_running_average=False, axis_name="batch")
        variables = layer.init(jax.random.key(0), X[0])

        def step(x):
            return layer.apply(variables, x, mutable=["batch_stats"])

        return jax.vmap(step, axis_name="batch", out_axes=(0, None))(X)

    (y, new), (want, want_new) = train(bnjax.linen), train(nn)
    np.testing.assert_allclose(y, want, atol=2e-6)
    mean = new["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, want_new["batch_stats"]["mean"], rtol=1e-6)

    def step(x):
        return bnjax.batch_norm(x, None, None, STATS, axis_name="batch")

    y, new = jax.vmap(step, axis_name="batch", out_axes=(0, None))(X)
    want, want_new = bnjax.batch_norm(X, None, None, STATS)
    np.testing.assert_allclose(y, want, atol=2e-6)
    np.testing.assert_allclose(new.var, want_new.var, rtol=1e-6)


def test_one_example_a_device_in_nnx():
    def train(layers):
        layer = layers.BatchNorm(4, axis_name="batch", rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)

        def step(x):
            layer = nnx.merge(graph, state, copy=True)
            return layer(x, use_running_average=False), layer.mean[...]

        return jax.vmap(step, axis_name="batch", out_axes=(0, None))(X)

    for one, other in zip(train(bnjax.nnx), train(nnx), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6)


def test_rank_one_in_inference():
    y, stats = bnjax.batch_norm(X[0], None, None, STATS, use_running_average=True)
    np.testing.assert_allclose(y, (X[0] - 0.5) / np.sqrt(2 + 1e-5), rtol=1e-6)
    assert stats is STATS


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_no_rows_in_inference(shape):
    x = jnp.zeros(shape)
    y, _ = bnjax.batch_norm(x, None, None, STATS, use_running_average=True)
    assert y.shape == shape
    layer = bnjax.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), X)
    assert layer.apply(variables, x).shape == shape


@pytest.mark.slow
@pytest.mark.usefixtures("strict")
def test_complex_inputs_under_strict_promotion():
    x = jnp.asarray(X, jnp.complex64) * (1 + 2j)
    mask = jnp.arange(16)[:, None] % 3 != 0
    y, new = bnjax.batch_norm(x, jnp.ones(4), jnp.zeros(4), STATS, mask=mask)
    mean = x[mask[:, 0]].mean(0)
    np.testing.assert_allclose(new.mean, 0.99 * 0.5 + 0.01 * mean, rtol=1e-5)
    assert y.dtype == x.dtype


@pytest.mark.slow
def test_complex_inputs_as_flax_takes_them():
    x = np.complex64(RNG.normal(size=(32, 3)) + 1j * RNG.normal(size=(32, 3)) * 2 + 3)

    def train(layers):
        layer = layers.BatchNorm(use_running_average=False, momentum=0.5)
        variables = layer.init(jax.random.key(0), x)

        def loss(x):
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(jnp.abs(y) ** 3), (y, new)

        gradient, (y, new) = jax.grad(loss, has_aux=True)(x)
        return gradient, y, new["batch_stats"]["mean"]

    for one, other in zip(train(bnjax.linen), train(nn), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
