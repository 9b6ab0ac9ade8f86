"""Small networks, and their population statistics in float64 NumPy, from the paper."""

import functools

import jax
import numpy as np

from bnjax.models import MLP, Normalization
from tests import oracle
from tests.models.helpers import random_variables
from tests.training import numpy_network

METHODS = ("paper", "pooled")
EXAMPLES, DEVICES = 32, 8


def train_call(model):
    def call(variables, batch):
        return model.apply(variables, batch, train=True, mutable=["batch_stats"])

    return call


@functools.cache
def mlp(axis_name=None, dtype=np.float32):
    """The call of a training step, the variables, and three batches.

    Devices have parts of a batch that differ, so that it matters who shares.
    """
    options = {"normalization": Normalization(axis_name=axis_name)}
    model = MLP((6, 5), 3, param_dtype=dtype, **options)
    batches = np.random.default_rng(4).normal(1, 3, (3, EXAMPLES, 4))
    batches += np.repeat(np.arange(DEVICES), EXAMPLES // DEVICES)[:, None]
    batches = batches.astype(dtype)
    variables = random_variables(MLP((6, 5), 3, param_dtype=dtype), batches[0])
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)
    return train_call(model), variables, batches


def mlp_population(variables, batches, method):
    """What `recompute_batch_stats` should give for the layers of an MLP."""
    inputs = [mlp_inputs(variables["params"], x) for x in batches]
    return populations(inputs, method)


def mlp_inputs(params, x):
    """What the layers of `bnjax.models.MLP` are given in training."""
    params = as_float64(params)
    count = len(params) // 2
    stats = {f"bn_{i}": {"mean": 0, "var": 1} for i in range(count)}
    _, _, (kept, _) = numpy_network.forward(params, stats, x, train=True)
    return {
        f"bn_{i}": kept[i][0] @ params[f"dense_{i}"]["kernel"] for i in range(count)
    }


def classifier_inputs(params, x):
    """What the layers of `tests.networks.Classifier` are given in training."""
    params, x, inputs = as_float64(params), np.float64(x), {}
    for i in range(2):
        name = f"BatchNorm_{i}"
        inputs[name] = x = conv3x3(x, params[f"Conv_{i}"]["kernel"])
        x = np.maximum(oracle.forward(x, **params[name]), 0)
    return inputs


def conv3x3(x, kernel):
    """A convolution of (batch, height, width, channels) with zeros around it."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def population(batches, method, masks=None):
    """Mean and variance of what one layer is given in some batches."""
    masks = [None] * len(batches) if masks is None else masks
    rows = [_rows(x, mask) for x, mask in zip(batches, masks, strict=True)]
    if method == "pooled":
        rows = np.concatenate(rows)
        return {"mean": rows.mean(0), "var": rows.var(0, ddof=1)}
    counts = [len(each) for each in rows]
    return {
        "mean": np.average([each.mean(0) for each in rows], 0, counts),
        "var": np.average([each.var(0, ddof=1) for each in rows], 0, counts),
    }


def _rows(x, mask):
    shown = True if mask is None else np.broadcast_to(mask, x.shape)[..., 0]
    return np.float64(x)[np.broadcast_to(shown, x.shape[:-1])]


def populations(inputs, method):
    """`population` of every layer; `inputs` has one dict a batch."""
    return {
        name: population([each[name] for each in inputs], method) for name in inputs[0]
    }


def assert_relative(got, want, tolerance=1e-6):
    """Same tree; means within `tolerance` deviations, variances relatively."""
    assert set(got) == set(want)
    for name, stats in want.items():
        deviation = np.sqrt(stats["var"])
        np.testing.assert_array_less(
            np.abs(got[name]["mean"] - stats["mean"]), tolerance * deviation
        )
        np.testing.assert_allclose(
            np.float64(got[name]["var"]), stats["var"], rtol=tolerance, atol=0
        )


def as_float64(tree):
    return jax.tree.map(np.float64, tree)
