"""Data, steps and counts for the tests of statistics shared between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np

import bnjax

DEVICES = 8
COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(compiled):
    """Element counts of the arrays that each collective moves."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            found.append(sum(int(np.prod([*map(int, s.split(","))])) for s in shapes))
    return found


def data(masked, features=4, mean=0.0):
    """Shards of different means, with different numbers of live examples."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(16, 3, 3, features)) * 2 + mean
    x += np.repeat(np.arange(DEVICES), 2)[:, None, None, None]
    scale, bias, dy = (
        rng.normal(size=shape) for shape in ((features,), (features,), x.shape)
    )
    mask = None
    if masked:
        mask = rng.random((16, 1, 1, 1)) < 0.7
        mask[:5] = [[[[False]]], [[[True]]], [[[False]]], [[[False]]], [[[True]]]]
        x[0] = np.nan
        dy[0] = 0
    x, scale, bias, dy = (np.float32(a) for a in (x, scale, bias, dy))
    return x, scale, bias, dy, mask


def step(x, scale, bias, dy, mask, axis_name=None, groups=None):
    """Output, running statistics and gradients of a layer with an activation."""
    stats = bnjax.BatchStats.init(scale.shape)

    def loss(x, scale, bias):
        y, new = bnjax.batch_norm(
            x,
            scale,
            bias,
            stats,
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=groups,
            activation="sigmoid",
        )
        return jnp.sum(y * dy), (y, new)

    (_, (y, new)), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
        x, scale, bias
    )
    return y, new, gradients


def shards(array):
    return None if array is None else array.reshape(DEVICES, -1, *array.shape[1:])


def assert_same(got, want, atol=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def joined(y, stats, gradients):
    """What eight replicas give, as one device would give it."""
    dx, dscale, dbias = gradients
    for leaf in jax.tree.leaves(stats):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    first = jax.tree.map(lambda a: a[0], stats)
    flat = [np.asarray(a).reshape(16, 3, 3, -1) for a in (y, dx)]
    return flat[0], first, (flat[1], dscale.sum(0), dbias.sum(0))
