"""Whitening in float64 from the papers' formulas, and a step to compare with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.variants.whitening import WhiteningStats, whitening_batch_norm

METHODS = [None, 5]
MOMENTUM, EPSILON = 0.9, 1e-3
# Six channels in two groups of three, 45 values of each.
SHAPE, SIZE = (9, 5, 6), 3


def data(seed=0, shape=SHAPE, dtype=None):
    """Correlated values, scale, bias, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=shape) @ rng.normal(size=(shape[-1],) * 2) + 2
    arrays = mixed, rng.normal(size=shape[-1:]), rng.normal(size=shape[-1:])
    return [jnp.asarray(a, dtype) for a in (*arrays, rng.normal(size=shape))]


def start(dtype="float64"):
    return WhiteningStats.init(6, SIZE, dtype)


def inverse_sqrt(cov, iterations, epsilon=EPSILON):
    """ZCA and IterNorm as their papers write them, in float64."""
    cov = np.asarray(cov, np.float64) + epsilon * np.eye(len(cov))
    if iterations is None:
        values, vectors = np.linalg.eigh(cov)
        return vectors @ np.diag(values**-0.5) @ vectors.T
    normalized, power = cov / np.trace(cov), np.eye(len(cov))
    for _ in range(iterations):
        power = (3 * power - power @ power @ power @ normalized) / 2
    return power / np.sqrt(np.trace(cov))


def moments(x, weights=None, size=SIZE):
    """Mean, biased covariances of the groups and count, in float64."""
    x = np.asarray(x, np.float64)
    rows = x.reshape(-1, x.shape[-1])
    weights = np.ones(x.shape) if weights is None else np.broadcast_to(weights, x.shape)
    w = weights.reshape(rows.shape)[:, :1].astype(np.float64)
    rows = np.where(w > 0, rows, 0)
    mean = (w * rows).sum(0) / w.sum()
    whole = (w * (rows - mean)).T @ (rows - mean) / w.sum()
    cov = [whole[i : i + size, i : i + size] for i in range(0, len(mean), size)]
    return mean, np.stack(cov), w.sum()


def whitened(x, mean, cov, iterations, scale=1.0, bias=0.0, epsilon=EPSILON):
    matrices = [inverse_sqrt(each, iterations, epsilon) for each in cov]
    size = len(matrices[0])
    x = np.asarray(x, np.float64) - mean
    parts = [x[..., i * size : (i + 1) * size] @ m for i, m in enumerate(matrices)]
    return np.asarray(scale) * np.concatenate(parts, -1) + np.asarray(bias)


def close(found, expected, rtol=1e-10, atol=1e-10):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol
        )


@functools.partial(jax.jit, static_argnames=("iterations", "options"))
def train(x, scale, bias, stats, dy, mask=None, *, iterations, options=()):
    """Output, new statistics and gradients of one step."""

    def loss(x, scale, bias):
        settings = {"group_size": SIZE, "momentum": MOMENTUM, "epsilon": EPSILON}
        y, new = whitening_batch_norm(
            x,
            scale,
            bias,
            stats,
            iterations=iterations,
            mask=mask,
            **settings | dict(options),
        )
        return jnp.sum(y * dy), (y, new)

    grads, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return y, new, grads
