"""Convolutional layers in NumPy, straight from their definitions."""

import numpy as np


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def same(size, kernel, stride):
    """What TensorFlow's "SAME" adds before and after, worked out per axis."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def windows(x, kernel, stride, padding, fill=0.0):
    """All windows, shape (batch, height, width, kernel, kernel, channels)."""
    if padding == "SAME":
        pads = [same(n, kernel, stride) for n in x.shape[1:3]]
    else:
        pads = [(padding, padding)] * 2
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    seen = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (1, 2))
    return seen[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def convolve(x, kernel, stride=1, padding="SAME"):
    seen = windows(x, kernel.shape[0], stride, padding)
    return np.einsum("nhwijc,ijcd->nhwd", seen, kernel)


def pool(x, take, kernel, stride, padding="SAME"):
    """`take` of each window over what is no padding: NaN marks the padding."""
    seen = windows(x, kernel, stride, padding, np.nan)
    return take(seen, axis=(3, 4))


def normalize(x, params, epsilon=1e-5):
    axes = tuple(range(x.ndim - np.ndim(params["scale"])))
    mean, var = x.mean(axes), x.var(axes)
    return params["scale"] * (x - mean) / np.sqrt(var + epsilon) + params["bias"]


def conv_norm(x, params, stride=1, padding="SAME", residual=0.0, activate=relu):
    """A ConvNorm in training, with BN or with a bias, by what parameters there are."""
    if "depthwise" in params:
        kernel = params["depthwise"]["kernel"]
        channels = x.shape[-1]
        parts = np.split(kernel, channels, axis=-1)
        x = np.concatenate(
            [convolve(x[..., [c]], parts[c], stride) for c in range(channels)], axis=-1
        )
        stride = 1
    x = convolve(x, params["conv"]["kernel"], stride, padding)
    x = normalize(x, params["bn"]) if "bn" in params else x + params["conv"]["bias"]
    return activate(x + residual)
