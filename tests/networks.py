"""Small networks that take the batch norm layer as an argument, ours or Flax's."""

from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx

LINEN = bnjax.linen.BatchNorm, flax.linen.BatchNorm
NNX = bnjax.nnx.BatchNorm, flax.nnx.BatchNorm
KEEP_STATISTICS = jax.checkpoint_policies.save_only_these_names(bnjax.CHECKPOINT_NAME)


class Classifier(nn.Module):
    """Two blocks of convolution, batch norm and relu, a mean over positions, logits."""

    norm: type[nn.Module]
    axis_name: str | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        kinds = {"param_dtype": self.param_dtype}
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), use_bias=False, **kinds)(x)
            norm = self.norm(momentum=0.9, axis_name=self.axis_name, **kinds)
            x = nn.relu(norm(x, use_running_average=not train))
        return nn.Dense(3, **kinds)(x.mean((1, 2)))


class Network(nnx.Module):
    """The same for flax.nnx, of one block."""

    def __init__(self, norm, rngs, *, param_dtype=jnp.float32, **options):
        options = {"momentum": 0.9, **options}
        self.conv = nnx.Conv(
            3, 4, (3, 3), use_bias=False, param_dtype=param_dtype, rngs=rngs
        )
        self.norm = norm(4, param_dtype=param_dtype, rngs=rngs, **options)
        self.dense = nnx.Linear(4, 3, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x))).mean((-3, -2)))


def images(count=8, dtype=np.float32, channels=3):
    """Images and labels that a network can tell apart, the same at every call."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    x = rng.normal(size=(count, 5, 5, channels)) + 0.7 * labels[:, None, None, None]
    return x.astype(dtype), labels


def cross_entropy(logits, labels):
    """Mean over the batch."""
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * hot, -1))


def assert_same(got, want, tolerance=1e-4):
    """Same tree and dtypes; values within `tolerance` of each leaf's largest entry."""
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        atol = tolerance * max(np.abs(b).max(initial=0), tolerance)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
