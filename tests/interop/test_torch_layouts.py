"""Kernels, flattened features and biases: beside NumPy, and a biased network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax.interop.torch import from_torch, match, to_torch, trace
from bnjax.linen import BatchNorm
from tests.interop.torch_convnet import (
    assert_states_equal,
    shapes_of,
    torch_convolution,
)


def torch_transposed_convolution(x, weight):
    """Of x (batch, in, *size) by weight (in, out, *kernel), in float64."""
    size = [n + k - 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    y = np.zeros((len(x), weight.shape[1], *size))
    for k in itertools.product(*map(range, weight.shape[2:])):
        window = tuple(slice(i, i + n) for i, n in zip(k, x.shape[2:], strict=True))
        y[(..., *window)] += np.einsum("bi...,io->bo...", x, weight[(..., *k)])
    return y


@pytest.mark.parametrize("pixels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "transposed", "transpose_kernel"])
def test_kernels_of_every_rank(kind, pixels):
    rng = np.random.default_rng(pixels)
    kernel, channels = (
        (2, 3, 2)[:pixels],
        (4, 4),
    )  # as many in as out: shapes tell nothing
    weight = rng.normal(size=(*channels, *kernel)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    x = rng.normal(size=(2, 4, *(4, 5, 3)[:pixels])).astype(np.float32)
    if kind == "plain":
        net = nn.Conv(4, kernel, padding="VALID")
        expected = torch_convolution(x, weight)
    else:
        swapped = kind == "transpose_kernel"
        net = nn.ConvTranspose(4, kernel, padding="VALID", transpose_kernel=swapped)
        expected = torch_transposed_convolution(x, weight)
    moved = jnp.asarray(np.moveaxis(x, 1, -1))
    shapes = shapes_of(net, moved)
    torch_state = {"up.weight": weight, "up.bias": bias}
    mapping = match(torch_state, shapes, calls=trace(net, moved))
    variables = from_torch(torch_state, shapes, mapping=mapping)
    expected += bias.reshape(4, *[1] * pixels)
    actual = np.moveaxis(np.asarray(net.apply(variables, moved)), -1, 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert_states_equal(to_torch(variables, mapping), torch_state, 0)


class FlattenedNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (1, 1))(x)
        x = BatchNorm(use_running_average=True)(x.reshape(len(x), -1))
        return nn.Dense(2)(x)


def test_a_norm_of_flattened_features():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 5, 3)), jnp.float32)
    net = FlattenedNorm()
    shapes = shapes_of(net, x)
    mapping = match(
        {
            "0.weight": jax.ShapeDtypeStruct((3, 3, 1, 1), np.float32),
            "0.bias": jax.ShapeDtypeStruct((3,), np.float32),
            **{
                f"2.{name}": jax.ShapeDtypeStruct((60,), np.float32)
                for name in ("weight", "bias", "running_mean", "running_var")
            },
            "3.weight": jax.ShapeDtypeStruct((2, 60), np.float32),
            "3.bias": jax.ShapeDtypeStruct((2,), np.float32),
        },
        shapes,
        calls=trace(net, x),
    )
    torch_state = {
        pair.name: rng.uniform(0.5, 1.5, pair.leaf.torch_shape).astype(np.float32)
        for pair in mapping.pairs
    }
    variables = from_torch(torch_state, shapes, mapping=mapping)

    s = torch_state
    y = torch_convolution(np.moveaxis(np.asarray(x), -1, 1), s["0.weight"])
    y = (y + s["0.bias"][:, None, None]).reshape(2, 60)
    y = (y - s["2.running_mean"]) / np.sqrt(s["2.running_var"] + 1e-5)
    y = (y * s["2.weight"] + s["2.bias"]) @ s["3.weight"].T + s["3.bias"]
    np.testing.assert_allclose(net.apply(variables, x), y, rtol=1e-5, atol=1e-5)
    assert_states_equal(to_torch(variables, mapping), torch_state, 0)


class Biased(nn.Module):
    """Convolutions before BN, with biases or without."""

    biases: bool

    @nn.compact
    def __call__(self, x, *, train):
        def normalize(x):
            return BatchNorm(not train, momentum=0.9, unbiased=True)(x)

        y = nn.relu(normalize(nn.Conv(3, (3, 3), use_bias=self.biases)(x)))
        return normalize(nn.Conv(5, (3, 3), use_bias=self.biases)(y))


def test_a_bias_before_a_norm_goes_into_the_mean():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 2)), jnp.float32)
    theirs, ours = Biased(True), Biased(False)
    biased = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype),
        dict(shapes_of(theirs, x, train=False)),
    )
    torch_state = to_torch(biased)
    shapes = shapes_of(ours, x, train=False)
    with pytest.raises(ValueError, match=r"no place for Conv_0\.bias.*into the mean"):
        match(torch_state, shapes)
    mapping = match(torch_state, shapes, calls=trace(ours, x, train=False))
    assert str(mapping).count("subtracted") == 2
    variables = from_torch(torch_state, shapes, mapping=mapping)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(ours.apply(variables, x, train=False), theirs.apply(biased, x, train=False))

    def train(net, variables):
        y, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, {**variables, **new}

    (y, new), (expected, new_biased) = train(ours, variables), train(theirs, biased)
    close(y, expected)
    close(ours.apply(new, x, train=False), theirs.apply(new_biased, x, train=False))
    back = from_torch(to_torch(new, mapping), biased)
    close(theirs.apply(back, x, train=False), ours.apply(new, x, train=False))


class Summed(nn.Module):
    """A sum between a convolution and BN, or around BN."""

    before: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (1, 1), use_bias=False)(x)
        z = BatchNorm(use_running_average=True)(x + y if self.before else y)
        return z if self.before else y + z


@pytest.mark.parametrize("before", [True, False])
def test_a_bias_that_goes_elsewhere_too_is_refused(before):
    x, net = jnp.ones((1, 2, 2, 3)), Summed(before)
    shapes = shapes_of(net, x)
    names = ("weight", "bias", "running_mean", "running_var")
    torch_state = {f"bn.{name}": np.ones(3) for name in names}
    torch_state |= {"conv.weight": np.ones((3, 3, 1, 1)), "conv.bias": np.ones(3)}
    with pytest.raises(ValueError, match=r"no place for conv\.bias"):
        match(torch_state, shapes, calls=trace(net, x))
