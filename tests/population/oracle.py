"""Population statistics of small networks in float64 NumPy, from the paper."""

import numpy as np

from tests import oracle
from tests.training import numpy_network


def conv3x3(x, kernel):
    """A convolution of (batch, height, width, channels) with zeros around it."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def classifier_inputs(params, x):
    """What the layers of `tests.networks.Classifier` are given in training."""
    params, x, inputs = as_float64(params), np.float64(x), {}
    for i in range(2):
        name = f"BatchNorm_{i}"
        inputs[name] = x = conv3x3(x, params[f"Conv_{i}"]["kernel"])
        x = np.maximum(oracle.forward(x, **params[name]), 0)
    return inputs


def mlp_inputs(params, x):
    """What the layers of `bnjax.models.MLP` are given in training."""
    params = as_float64(params)
    count = len(params) // 2
    stats = {f"bn_{i}": {"mean": 0, "var": 1} for i in range(count)}
    _, _, (kept, _) = numpy_network.forward(params, stats, x, train=True)
    return {
        f"bn_{i}": kept[i][0] @ params[f"dense_{i}"]["kernel"] for i in range(count)
    }


def population(batches, method, masks=None):
    """Mean and variance of what one layer is given in some batches."""
    masks = [None] * len(batches) if masks is None else masks
    rows = [_rows(x, mask) for x, mask in zip(batches, masks, strict=True)]
    if method == "pooled":
        rows = np.concatenate(rows)
        return {"mean": rows.mean(0), "var": rows.var(0, ddof=1)}
    counts = [len(each) for each in rows]
    means, variances = ([f(each) for each in rows] for f in (_mean, _unbiased))
    return {
        "mean": np.average(means, axis=0, weights=counts),
        "var": np.average(variances, axis=0, weights=counts),
    }


def populations(inputs, method):
    """`population` of every layer; `inputs` has one dict a batch."""
    return {
        name: population([each[name] for each in inputs], method) for name in inputs[0]
    }


def assert_relative(got, want, tolerance):
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
    return {
        name: as_float64(below) if isinstance(below, dict) else np.float64(below)
        for name, below in tree.items()
    }


def _rows(x, mask):
    x = np.float64(x)
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    return rows[np.broadcast_to(mask, x.shape)[..., 0].ravel()]


def _mean(rows):
    return rows.mean(0)


def _unbiased(rows):
    return rows.var(0, ddof=1)
