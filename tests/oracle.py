"""Batch normalization in float64 NumPy, written from the paper alone.

Algorithm 1 and the six equations of section 3 as they are printed, with weights that
count as repeats: an example of weight 2 is an example that is there twice.
"""

import numpy as np


def _weights(x, mask, axes):
    weight = np.ones_like(x) if mask is None else np.broadcast_to(mask, x.shape) * 1.0
    return weight, weight.sum(axes, keepdims=True)


def reduction_axes(x, axis):
    features = {a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(a for a in range(x.ndim) if a not in features)


def moments(x, axis=-1, mask=None):
    """Mean, biased variance and count, each with the rank of `x`."""
    x = np.asarray(x, np.float64)
    axes = reduction_axes(x, axis)
    weight, count = _weights(x, mask, axes)
    x = np.where(weight > 0, x, 0)
    mean = (weight * x).sum(axes, keepdims=True) / np.maximum(count, 1e-300)
    var = (weight * (x - mean) ** 2).sum(axes, keepdims=True)
    return mean, var / np.maximum(count, 1e-300), count


def per_channel(value, x, axis):
    """A per-channel vector with the rank of `x`."""
    return np.expand_dims(np.asarray(value, np.float64), reduction_axes(x, axis))


def forward(x, scale, bias, axis=-1, epsilon=1e-5, mask=None):
    """Algorithm 1."""
    x = np.asarray(x, np.float64)
    mean, var, _ = moments(x, axis, mask)
    xhat = (x - mean) / np.sqrt(var + epsilon)
    return per_channel(scale, x, axis) * xhat + per_channel(bias, x, axis)


def backward(x, scale, dy, axis=-1, epsilon=1e-5, mask=None):
    """Gradients with respect to x, scale and bias: section 3, before simplification."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes = reduction_axes(x, axis)
    weight, _ = _weights(x, mask, axes)
    mean, var, count = moments(x, axis, mask)
    share = weight / np.maximum(count, 1e-300)
    distance = x - mean
    inverse = 1 / np.sqrt(var + epsilon)
    dxhat = dy * per_channel(scale, x, axis)
    dvar = (dxhat * distance).sum(axes, keepdims=True) * -0.5 * inverse**3
    dmean = -(dxhat * inverse).sum(axes, keepdims=True)
    dmean = dmean + dvar * (share * -2 * distance).sum(axes, keepdims=True)
    dx = dxhat * inverse + dvar * 2 * distance * share + dmean * share
    return dx, (dy * distance * inverse).sum(axes), dy.sum(axes)


def running(old, x, axis=-1, momentum=0.99, unbiased=True, mask=None):
    """Running mean and variance after one training step."""
    mean, var, count = moments(x, axis, mask)
    if unbiased:
        var = var * count / (count - 1)
    axes = reduction_axes(x, axis)
    mean, var = mean.squeeze(axes), var.squeeze(axes)
    return (
        momentum * np.asarray(old.mean, np.float64) + (1 - momentum) * mean,
        momentum * np.asarray(old.var, np.float64) + (1 - momentum) * var,
    )
