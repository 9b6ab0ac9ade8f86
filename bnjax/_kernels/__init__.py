"""Passes of batch normalization in C, for CPUs: XLA calls them as its own.

XLA for CPU computes each sum over a batch in a call of its own, and what two sums have
in common by way of memory. Here a pass reads its arrays once, at the width of the
processor, and asks for large pages where it writes. The library is built from source
where it is first needed (`library`); where that can't be, all is left to XLA.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._kernels.library import available, target

# float16 is handed over as float32.
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
RELU, RESIDUAL = 1, 2


def serve(axes: Sequence[int], x: jax.Array, *dtypes: Any) -> bool:
    """Whether the kernels compute this.

    Args:
        axes: of the sums.
        x: the input.
        *dtypes: of other arrays of its shape.
    """
    leading = tuple(axes) == tuple(range(len(axes)))
    known = all(dtype in DTYPES for dtype in (x.dtype, *dtypes))
    return leading and known and x.size > 0 and available()


def moments(x: jax.Array, axes: Sequence[int]) -> list[jax.Array]:
    """An origin, and the mean and variance of x - origin, each of shape (features,)."""
    shape = x.shape[len(axes) :]
    channel = _channel(shape)
    found = _call("moments", [channel, channel, channel], _rows(x, shape))
    return [value.reshape(shape) for value in found]


def output(
    x: jax.Array,
    channels: Sequence[jax.Array],
    residual: jax.Array | None,
    relu: bool,
    dtype: Any,
) -> jax.Array:
    """The output, of the shape of `x`.

    Args:
        x: the input.
        channels: origin, mean, var, epsilon, scale and bias: float32, of shape
            (features,) all but epsilon.
        residual: of the shape of `x`; None where there is no ReLU.
        relu: whether there is one after the transform.
        dtype: of the output.
    """
    shape = channels[0].shape
    rows = _rows(x, shape)
    (y,) = _call(
        "output",
        [jax.ShapeDtypeStruct(rows.shape, _known(dtype))],
        rows,
        *map(jnp.ravel, channels),
        *_residual(residual, rows),
        flags=_flags(relu, residual),
    )
    return y.reshape(x.shape).astype(dtype)


def gradient(
    dy: jax.Array,
    x: jax.Array,
    channels: Sequence[jax.Array],
    residual: jax.Array | None,
    relu: bool,
) -> list[jax.Array]:
    """The gradients of x, epsilon, scale and bias, and of the residual where there is.

    Args:
        dy: that of the output.
        x: the input.
        channels: as of `output`, and the gradients of mean and var after them.
        residual: as of `output`.
        relu: as of `output`.
    """
    shape = channels[0].shape
    rows = _rows(x, shape)
    like = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    residuals = _residual(residual, rows)
    channel, scalar = _channel(shape), _channel(())
    dx, depsilon, dscale, dbias, *dresidual = _call(
        "gradient",
        [like, scalar, channel, channel, *(like for _ in residuals)],
        _rows(dy, shape),
        rows,
        *map(jnp.ravel, channels),
        *residuals,
        flags=_flags(relu, residual),
    )
    return [
        dx.reshape(x.shape),
        depsilon.reshape(()),
        dscale.reshape(shape),
        dbias.reshape(shape),
        *(value.reshape(x.shape) for value in dresidual),
    ]


def _call(handler: str, results: list[Any], *arrays: jax.Array, flags: int = 0) -> Any:
    return jax.ffi.ffi_call(target(handler), results)(*arrays, flags=np.int64(flags))


def _flags(relu: bool, residual: jax.Array | None) -> int:
    return RELU * relu | RESIDUAL * (residual is not None)


def _known(dtype: Any) -> Any:
    return jnp.float32 if dtype == jnp.float16 else dtype


def _rows(array: jax.Array, features: Sequence[int]) -> jax.Array:
    return array.reshape(-1, math.prod(features)).astype(_known(array.dtype))


def _residual(residual: jax.Array | None, rows: jax.Array) -> list[jax.Array]:
    """It as a list, empty where there is none, of the shape and dtype of the input."""
    if residual is None:
        return []
    return [residual.reshape(rows.shape).astype(rows.dtype)]


def _channel(features: Sequence[int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((math.prod(features),), jnp.float32)
