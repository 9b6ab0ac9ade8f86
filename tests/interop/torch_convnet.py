"""The network of golden/make_torch_convnet.py in linen, and what the tests share."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bnjax.interop.torch import batch_norm_options
from bnjax.linen import BatchNorm
from tests.golden import make_torch_convnet

PATH = pathlib.Path(make_torch_convnet.__file__).with_name("torch_convnet.npz")


class Net(nn.Module):
    layer: type[nn.BatchNorm] = BatchNorm

    @nn.compact
    def __call__(self, x, *, train):
        def normalize(x, *args, **options):
            options = batch_norm_options(*args, **options)
            if self.layer is nn.BatchNorm:
                del options["unbiased"]
            return nn.relu(self.layer(not train, **options)(x))

        x = normalize(nn.Conv(6, (3, 3), padding=1, use_bias=False)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), padding=1, use_bias=False, feature_group_count=3)(x)
        x = normalize(x, 0.3, 1e-3)
        x = nn.ConvTranspose(4, (3, 3), (2, 2), padding=[(1, 2), (1, 2)])(x)
        x = nn.max_pool(normalize(x), (4, 4), (4, 4))
        x = nn.Dense(8, use_bias=False)(x.reshape(len(x), -1))
        return nn.Dense(3)(normalize(x, affine=False))


@functools.cache
def golden():
    with np.load(PATH, allow_pickle=False) as file:
        return dict(file)


def state(name):
    """A state dict of the golden values, in the order of PyTorch's modules."""
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in golden().items()
        if key.startswith(f"{name}/")
    }


def images(step):
    return jnp.asarray(golden()["x"][step].transpose(0, 2, 3, 1))


def shapes_of(net, x, **options):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), x, **options))


def assert_states_equal(actual, expected, atol):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=atol, err_msg=name)


def torch_convolution(x, weight):
    """Of x (batch, in, *size) by weight (out, in, *kernel), in float64."""
    size = [n - k + 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    y = np.zeros((len(x), weight.shape[0], *size))
    for k in itertools.product(*map(range, weight.shape[2:])):
        window = tuple(slice(i, i + n) for i, n in zip(k, size, strict=True))
        y += np.einsum("bi...,oi->bo...", x[(..., *window)], weight[(..., *k)])
    return y
