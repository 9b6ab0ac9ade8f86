"""`checkpoint_policy` keeps inputs and statistics, and computes the rest again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(8, 6, 6, 4)))
KERNELS = np.float32(RNG.normal(size=(3, 3, 3, 4, 4)) / 6)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def chain(kernels, x, activation="relu", axis_name=None):
    """Three times a convolution, BN and an activation inside or, if None, outside."""
    for kernel in kernels:
        x, _ = bnjax.batch_norm(
            conv(x, kernel),
            jnp.ones(4),
            jnp.zeros(4),
            bnjax.BatchStats.init(4),
            activation=activation,
            axis_name=axis_name,
        )
        if activation is None:
            x = jax.nn.relu(x)
    return jnp.sum(jnp.square(x))


def kept(function, *args):
    """Shapes of what the backward pass is given, without its arguments."""
    _, pullback = jax.vjp(function, *args)
    given = {id(leaf) for leaf in jax.tree.leaves(args)}
    return [leaf.shape for leaf in jax.tree.leaves(pullback) if id(leaf) not in given]


def remat(function):
    return jax.checkpoint(function, policy=bnjax.checkpoint_policy)


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_same_gradient(activation):
    function = functools.partial(chain, activation=activation)
    want = jax.jit(jax.grad(function))(KERNELS, X)
    got = jax.jit(jax.grad(remat(function)))(KERNELS, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", None])
def test_one_array_a_layer_is_kept(activation):
    function = functools.partial(chain, activation=activation)
    args = list(map(jnp.asarray, KERNELS)), jnp.asarray(X)
    large = [shape for shape in kept(remat(function), *args) if shape == X.shape]
    assert len(large) == len(KERNELS)
    without = [shape for shape in kept(function, *args) if shape == X.shape]
    assert len(without) > len(large)


def test_no_convolution_and_no_collective_twice():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    def loss(kernels, x):
        return jax.lax.psum(chain(kernels, x, axis_name="data"), "data")

    counts = []
    for function in (loss, remat(loss)):
        text = jax.jit(jax.grad(function)).lower(KERNELS, X).compile().as_text()
        counts.append([text.count(" convolution("), text.count(" all-reduce(")])
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


class Linen(nn.Module):
    """The chain with linen's layers."""

    remat: bool

    @nn.compact
    def __call__(self, x):
        layer = Block
        if self.remat:
            layer = nn.remat(Block, policy=bnjax.checkpoint_policy)
        for index in range(3):
            x = layer(name=f"block_{index}")(x)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return bnjax.linen.BatchNorm(False, activation="relu")(x)


def test_in_linen():
    results = []
    for remat_ in (False, True):
        model = Linen(remat_)
        variables = model.init(jax.random.key(0), X)

        def loss(params, model=model, variables=variables):
            y, new = model.apply(
                {**variables, "params": params}, X, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.square(y)), new

        results.append(jax.grad(loss, has_aux=True)(variables["params"]))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_in_nnx():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
            self.norm = bnjax.nnx.BatchNorm(4, activation="relu", rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x))

    def forward(model, x):
        return jnp.sum(jnp.square(model(x)))

    results = []
    for loss in (forward, nnx.remat(forward, policy=bnjax.checkpoint_policy)):
        model = Model()
        results.append((nnx.grad(loss)(model, X), nnx.state(model, nnx.BatchStat)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
