"""The backend in C for training on a CPU: what its kernels support, and the calls.

XLA for CPU computes each sum over a batch in a loop of its own, and writes to memory
what two sums have in common. A kernel reads its arrays once, at the full vector width
of the processor, and asks for large pages for its outputs. The library is built on
first use (`build`). If it cannot be built, XLA computes everything.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._cpu.build import available, target

# float16 is converted to float32 and back.
DTYPES = frozenset(map(jnp.dtype, ("float32", "bfloat16", "float16")))
# The codes of the activations in kernels.c. The kernels support these activations only.
ACTIVATION_CODES: dict[Callable | None, int] = {None: 0, jax.nn.relu: 1}


def kernel_supports(
    x: jax.Array,
    axes: Sequence[int],
    compute_dtype: Any,
    *,
    dtype: Any = jnp.float32,
    activation: Callable | None = None,
    mask: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> bool:
    """Whether the kernels compute this call; the first supported call builds them.

    Args:
        x: the input.
        axes: of the sums. The kernels support leading axes only.
        compute_dtype: of statistics and parameters.
        dtype: of the output.
        activation: after normalization.
        mask: of the values that count.
        residual: added before the activation.
    """
    return (
        tuple(axes) == tuple(range(len(axes)))
        and x.size > 0
        and {x.dtype, jnp.dtype(dtype)} <= DTYPES
        and jnp.dtype(compute_dtype) == jnp.float32
        and activation in ACTIVATION_CODES
        and mask is None
        and (residual is None or (activation is not None and residual.dtype == x.dtype))
        and available()
    )


def moments(x: jax.Array, axes: Sequence[int]) -> list[jax.Array]:
    """Return an origin close to the mean, and mean and variance of x - origin.

    Args:
        x: float32, bfloat16 or float16, of shape (*batch, *features).
        axes: those of the batch.

    Returns:
        Three float32 arrays of shape (*features,); the variance is biased.
    """
    features = x.shape[len(axes) :]
    results = [_per_channel(features)] * 3
    return [a.reshape(features) for a in _call("moments", results, _rows(x, features))]


def output(
    x: jax.Array,
    channels: Sequence[jax.Array],
    residual: jax.Array | None,
    activation: Callable | None,
    dtype: Any,
) -> jax.Array:
    """Return the output of the layer, of the shape of `x`.

    Args:
        x: shape (*batch, *features).
        channels: origin, mean about it, var, epsilon, scale and bias: float32, of shape
            (*features,), except for the scalar epsilon.
        residual: shape and dtype of `x`, with an activation only.
        activation: a key of ACTIVATION_CODES.
        dtype: of the output.

    Raises:
        KeyError: if the kernels do not support the activation.
    """
    features = channels[0].shape
    rows = _rows(x, features)
    residuals = [] if residual is None else [_rows(residual, features)]
    (y,) = _call(
        "output",
        [jax.ShapeDtypeStruct(rows.shape, _kernel_dtype(dtype))],
        *(rows, *map(jnp.ravel, channels), *residuals),
        activation=np.int64(ACTIVATION_CODES[activation]),
    )
    return y.reshape(x.shape).astype(dtype)


def gradient(
    dy: jax.Array,
    x: jax.Array,
    channels: Sequence[jax.Array],
    output: jax.Array | None,
    activation: Callable | None,
) -> list[jax.Array]:
    """Return the gradients of x, epsilon, scale, bias and, given `output`, a residual.

    Args:
        dy: gradient of the output, shape of `x`.
        x: shape (*batch, *features).
        channels: as in `output`, followed by the gradients of mean and var.
        output: output of the layer, of the dtype of `dy`. It is positive where the
            activation passed its argument on. Needed if a residual was added before the
            activation; if None, the sign is computed from `x`.
        activation: a key of ACTIVATION_CODES.

    Returns:
        dx of the shape of `x`, depsilon (scalar), dscale and dbias (*features,), and
        the gradient of the residual, of the shape of `x`. dx and dresidual have the
        dtype of `x`, but float32 for float16; the other arrays are float32.

    Raises:
        KeyError: if the kernels do not support the activation.
    """
    features = channels[0].shape
    rows = _rows(x, features)
    outputs = [] if output is None else [_rows(output, features)]
    like_x = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    channel, scalar = _per_channel(features), _per_channel(())
    dx, depsilon, dscale, dbias, *dresidual = _call(
        "gradient",
        [like_x, scalar, channel, channel, *(like_x for _ in outputs)],
        *(_rows(dy, features), rows, *map(jnp.ravel, channels), *outputs),
        activation=np.int64(ACTIVATION_CODES[activation]),
    )
    return [
        dx.reshape(x.shape),
        depsilon.reshape(()),
        dscale.reshape(features),
        dbias.reshape(features),
        *(value.reshape(x.shape) for value in dresidual),
    ]


def _call(handler: str, results: list[Any], *arrays: jax.Array, **attributes: Any):
    return jax.ffi.ffi_call(target(handler), results)(*arrays, **attributes)


def _kernel_dtype(dtype: Any) -> Any:
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


def _rows(array: jax.Array, features: Sequence[int]) -> jax.Array:
    """An array as the kernels take it, of shape (rows, features)."""
    return array.reshape(-1, math.prod(features)).astype(_kernel_dtype(array.dtype))


def _per_channel(features: Sequence[int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((math.prod(features),), jnp.float32)
