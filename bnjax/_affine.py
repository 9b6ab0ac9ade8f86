"""The map of normalization by given statistics: an affine map of each channel."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _cpu
from bnjax._operation import operation
from bnjax._statistics import Reduction, live

# Bytes from which glibc's malloc maps memory for every call, whatever was freed before.
MAPPED = 1 << 25


@dataclasses.dataclass(frozen=True)
class Transform:
    """What of a call to batch norm is known when it is traced."""

    reduction: Reduction
    activation: Callable | None
    dtype: jnp.dtype
    compute_dtype: jnp.dtype

    def cast(self, value: Any) -> Any:
        """`value` in the dtype of the computation; None stays None."""
        return None if value is None else value.astype(self.compute_dtype)


class Operands(NamedTuple):
    """The arrays of one call; None for what it does without.

    Attributes:
        x: the input, in its own dtype.
        epsilon: scalar of the dtype of the computation.
        mask: booleans or weights of the rank of `x`.
        scale: shape (features,).
        bias: shape (features,).
        residual: shape of `x`, added before the activation.
        consts: arrays that the activation depends on besides its argument.
    """

    x: jax.Array
    epsilon: jax.Array
    mask: jax.Array | None = None
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    residual: jax.Array | None = None
    consts: tuple[jax.Array, ...] = ()


class Channels(NamedTuple):
    """What is one number per channel, of the rank of the input."""

    mean: jax.Array
    inverse: jax.Array
    gain: jax.Array
    bias: jax.Array | None
    origin: jax.Array | None


def channels_of(
    transform: Transform,
    operands: Operands,
    mean: jax.Array,
    var: jax.Array,
    origin: jax.Array | None = None,
) -> Channels:
    """The statistics, and what follows from them, as the output needs them."""

    def expand(value: Any) -> Any:
        return None if value is None else transform.reduction.expand(value)

    inverse = lax.rsqrt(transform.cast(var) + operands.epsilon)
    return Channels(
        expand(transform.cast(mean)),
        expand(inverse),
        expand(
            inverse
            if operands.scale is None
            else transform.cast(operands.scale) * inverse
        ),
        expand(transform.cast(operands.bias)),
        expand(origin),
    )


def distance_of(
    transform: Transform, operands: Operands, channels: Channels
) -> tuple[jax.Array, Any]:
    """`x` less its mean, 0 where a mask hides what is not finite, and where it does.

    Origin and mean are subtracted one by one: their sum would round where it is large.
    """
    distance = transform.cast(operands.x)
    if channels.origin is not None:
        distance = distance - channels.origin
    distance = distance - channels.mean
    if operands.mask is None:
        return distance, None
    hidden = _hidden(distance, operands.mask)
    return jnp.where(hidden, 0, distance), hidden


def preactivation(
    transform: Transform, operands: Operands, channels: Channels, distance: jax.Array
) -> jax.Array:
    """The output before the activation, in the dtype of the computation."""
    z = distance * channels.gain
    if channels.bias is not None:
        z = z + channels.bias
    if operands.residual is not None:
        residual = transform.cast(operands.residual)
        if operands.mask is not None:
            residual = jnp.where(_hidden(residual, operands.mask), 0, residual)
        z = z + residual
    return z


def output(transform: Transform, operands: Operands, channels: Channels) -> jax.Array:
    """The output, in its own dtype."""
    distance, _ = distance_of(transform, operands, channels)
    z = preactivation(transform, operands, channels, distance)
    if transform.activation is not None:
        z = transform.activation(z, *operands.consts)
    return z.astype(transform.dtype)


def _normalized(operands, origin, mean, var, *, transform):
    return [
        output(transform, operands, channels_of(transform, operands, mean, var, origin))
    ]


def _normalized_on_cpu(operands, origin, mean, var, *, transform):
    # Without an activation, XLA fuses it with what follows: that is worth more than
    # large pages, unless the allocator maps the array anew each time.
    size = operands.x.size * transform.dtype.itemsize
    small = transform.activation is None and size < MAPPED
    if small or not served(transform, operands):
        return _normalized(operands, origin, mean, var, transform=transform)
    y = _cpu.output(
        operands.x,
        kernel_channels(operands, origin, mean, var),
        operands.residual,
        transform.activation,
        transform.dtype,
    )
    return [y]


normalized = operation("batch_norm_output", _normalized, on_cpu=_normalized_on_cpu)


def served(transform: Transform, operands: Operands) -> bool:
    """Whether the kernels for a CPU compute the output, and its gradient."""
    return _cpu.kernel_supports(
        operands.x,
        transform.reduction.axes,
        transform.compute_dtype,
        dtype=transform.dtype,
        activation=transform.activation,
        mask=operands.mask,
        residual=operands.residual,
    )


def kernel_channels(operands: Operands, *statistics: jax.Array) -> list[jax.Array]:
    """Origin, mean and var, epsilon, scale and bias, as the kernels take them."""
    like = statistics[0]
    scale = jnp.ones_like(like) if operands.scale is None else operands.scale
    bias = jnp.zeros_like(like) if operands.bias is None else operands.bias
    channels = (*statistics, operands.epsilon, scale, bias)
    return [channel.astype(jnp.float32) for channel in channels]


def _hidden(value, mask):
    # Squared, because a value that overflows only later harms as much as an inf.
    return ~live(mask) & ~jnp.isfinite(jnp.square(value))


def hoist_activation(
    transform: Transform, operands: Operands
) -> tuple[Transform, Operands]:
    """Make what the activation closes over an operand, so that it can be derived."""
    if transform.activation is None:
        return transform, operands
    example = jax.ShapeDtypeStruct(operands.x.shape, transform.compute_dtype)
    result = jax.eval_shape(transform.activation, example)
    if (result.shape, result.dtype) != (example.shape, example.dtype):
        raise ValueError(
            f"batch_norm: activation maps {example.dtype.name}{list(example.shape)} "
            f"to {result.dtype.name}{list(result.shape)}; expected an elementwise "
            "function that keeps shape and dtype."
        )
    activation, consts = jax.closure_convert(transform.activation, example)
    if not consts:
        return transform, operands
    transform = dataclasses.replace(transform, activation=activation)
    return transform, operands._replace(consts=tuple(consts))
