"""The network of golden/make_torch_convnet.py in linen, and what PyTorch gave."""

import functools
import pathlib

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
