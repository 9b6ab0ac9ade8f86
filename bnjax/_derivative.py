"""The map from x to y, and its derivative in the closed form of the paper.

The derivative is a linear map from the tangents of the inputs to those of the outputs.
With xhat = (x - mean) / sqrt(var + epsilon) and a = scale / sqrt(var + epsilon),

    dy = a * dx + xhat * A + B,
    A = dscale - a * mean(xhat * dx),      B = dbias - a * mean(dx).

Its transpose is the paper's backward pass. One sum over the batch for scale and one for
bias also give the gradient of x, in one collective if devices share statistics:

    dscale = sum(dy * xhat),      dbias = sum(dy),
    dx = a * (dy - dbias / m - xhat * dscale / m).

The code uses x - mean instead of xhat, and puts the factor between them into A: this
saves one multiplication for each value. JAX transposes the means, A and B. The
transpose of the elementwise part, with its two sums, is written out, because its form
decides how often XLA reads the arrays (`_elementwise_tangent_map_transpose`).

Between the passes, only `x` in its own dtype and per-channel vectors are kept:
everything else is recomputed from these. A ReLU after a residual keeps the output
instead of the residual: the next layer keeps the output anyway, and its sign is the
derivative.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _cpu
from bnjax._moments import (
    Moments,
    Reduction,
    checkpoint_named,
    mask_to_bool,
    moments_about_origin,
    safe_count,
    sum_in_blocks,
    varying_axes,
)
from bnjax._primitive import OneDevice, operation

# From this size in bytes, glibc's malloc maps new memory in each call, even if as much
# was freed before.
MAPPED = 1 << 25

_remat = functools.partial(jax.checkpoint, prevent_cse=False)


@dataclasses.dataclass(frozen=True)
class Transform:
    """The static part of a call to batch norm, known when the call is traced.

    Attributes:
        reduction: which values share statistics.
        activation: elementwise, without a closure over arrays; None for none.
        dtype: of the output.
        compute_dtype: of the computation: float32 or float64.
    """

    reduction: Reduction
    activation: Callable[..., jax.Array] | None
    dtype: jnp.dtype
    compute_dtype: jnp.dtype

    def cast(self, value: Any) -> Any:
        """`value` in the dtype of the computation; None stays None."""
        return None if value is None else value.astype(self.compute_dtype)


class Operands(NamedTuple):
    """The arrays of one call; None for each array that the call does not use.

    Attributes:
        x: the input, in its own dtype.
        epsilon: scalar of the dtype of the computation.
        mask: booleans or weights of the rank of `x`.
        scale: shape (features,).
        bias: shape (features,).
        residual: shape of `x`, added before the activation.
        consts: arrays that the activation depends on besides its argument.
        output: shape of `x`; used in the derivative instead of `residual`, to read the
            sign of a ReLU's argument from it.
    """

    x: jax.Array
    epsilon: jax.Array
    mask: jax.Array | None = None
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    residual: jax.Array | None = None
    consts: tuple[jax.Array, ...] = ()
    output: jax.Array | None = None


class ChannelParams(NamedTuple):
    """Per-channel numbers, in arrays of the rank of the input.

    Attributes:
        origin: a number close to the mean.
        mean: that of x - origin; None for 0.
        inv_std: 1 / sqrt(var + epsilon).
        multiplier: scale * inv_std.
        shift: bias - mean * multiplier; None for 0.
    """

    origin: jax.Array
    mean: jax.Array | None
    inv_std: jax.Array
    multiplier: jax.Array
    shift: jax.Array | None


def normalize_by_batch(
    transform: Transform, operands: Operands, known_origin: jax.Array | None
) -> tuple[jax.Array, jax.Array, Moments]:
    """Normalize by the statistics of the batch itself (Algorithm 1).

    Args:
        transform: the static part of the call.
        operands: the arrays.
        known_origin: as in `moments_about_origin`.

    Returns:
        The output, and the origin and Moments of `moments_about_origin`.
    """
    transform, operands = _hoist_activation(transform, operands)
    return _by_batch_jit(transform, operands, known_origin)


def normalize_by(
    transform: Transform, operands: Operands, mean: jax.Array, var: jax.Array
) -> jax.Array:
    """Normalize by given statistics, an affine map of each channel (Algorithm 2)."""
    transform, operands = _hoist_activation(transform, operands)

    @_remat
    def affine(operands, mean, var):
        # The mean itself is the origin.
        params = _channel_params(transform, operands, transform.cast(mean), None, var)
        return _output(transform, operands, params)

    return affine(operands, mean, var)


def _hoist_activation(
    transform: Transform, operands: Operands
) -> tuple[Transform, Operands]:
    """Make arrays that the activation closes over operands, to derive by them."""
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


def _channel_params(transform, operands, origin, mean, var) -> ChannelParams:
    cast, expand = transform.cast, transform.reduction.expand
    multiplier = inv_std = lax.rsqrt(cast(var) + operands.epsilon)
    if operands.scale is not None:
        multiplier = cast(operands.scale) * inv_std
    shift = cast(operands.bias)
    if mean is not None:
        shift = -mean * multiplier if shift is None else shift - mean * multiplier
    return ChannelParams(
        origin=expand(origin),
        mean=None if mean is None else expand(mean),
        inv_std=expand(inv_std),
        multiplier=expand(multiplier),
        shift=None if shift is None else expand(shift),
    )


def _distance(transform, operands, params):
    """Return x - origin, or its mean where a mask hides a value that is not finite."""
    distance = transform.cast(operands.x) - params.origin
    if operands.mask is None:
        return distance
    mean = 0 if params.mean is None else params.mean
    return jnp.where(_hidden(distance, operands.mask), mean, distance)


def _centered(transform, operands, params):
    """Return x - mean, the mean being that of the batch."""
    return _distance(transform, operands, params) - params.mean


def _hidden(value, mask):
    # Squared, because a value whose square overflows does the same harm as an inf.
    return ~mask_to_bool(mask) & ~jnp.isfinite(jnp.square(value))


def _preactivation(transform, operands, params, distance):
    """The output before the activation, in the dtype of the computation.

    scale * (x - mean) / sqrt(var + epsilon) + bias, with one subtraction. It is exact
    for any mean because the origin is close to the mean: origin + mean would be rounded
    if it is large.
    """
    z = distance * params.multiplier
    if params.shift is not None:
        z = z + params.shift
    if operands.residual is not None:
        residual = transform.cast(operands.residual)
        if operands.mask is not None:
            residual = jnp.where(_hidden(residual, operands.mask), 0, residual)
        z = z + residual
    return z


def _output(transform, operands, params):
    """The output, in its own dtype."""
    distance = _distance(transform, operands, params)
    z = _preactivation(transform, operands, params, distance)
    if transform.activation is jax.nn.relu and operands.residual is not None:
        # The same numbers as those of a float32 ReLU. But if `y` is the residual of
        # another layer, which converts it to float32, XLA for GPUs would see a float32
        # number rounded and widened, leave out both conversions, and keep `y` in
        # float32 too.
        return jnp.maximum(z.astype(transform.dtype), 0)
    if transform.activation is not None:
        z = transform.activation(z, *operands.consts)
    return z.astype(transform.dtype)


def _output_reference(operands, origin, mean, var, *, transform):
    params = _channel_params(transform, operands, origin, mean, var)
    return [_output(transform, operands, params)]


def _output_on_cpu(operands, origin, mean, var, *, transform):
    # Without an activation, XLA fuses the output with the operation that follows. This
    # saves more than large pages do, unless the allocator maps new memory each time.
    size = operands.x.size * transform.dtype.itemsize
    small = transform.activation is None and size < MAPPED
    if small or not _kernel_supports(transform, operands, operands.residual):
        return _output_reference(operands, origin, mean, var, transform=transform)
    channels = _kernel_channels(operands, origin, mean, var)
    activation, residual = transform.activation, operands.residual
    return [_cpu.output(operands.x, channels, residual, activation, transform.dtype)]


_output_operation = operation(
    "batch_norm_output", _output_reference, cpu=OneDevice(_output_on_cpu)
)


def _normalize(transform, operands, origin, moments):
    (y,) = _output_operation(
        operands, origin, moments.mean, moments.var, transform=transform
    )
    return y


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_batch(transform, operands, known_origin):
    origin, moments = moments_about_origin(
        operands.x,
        operands.mask,
        known_origin,
        transform.reduction,
        transform.compute_dtype,
    )
    return _normalize(transform, operands, origin, moments), origin, moments


# One trace serves every layer of the same shapes.
_by_batch_jit = jax.jit(_by_batch, static_argnums=0)


@_by_batch.defjvp
def _by_batch_jvp(transform, primals, tangents):
    (operands, known_origin), (doperands, _) = primals, tangents
    _, *statistics = _by_batch(transform, operands, known_origin)
    origin, moments = checkpoint_named(statistics)
    # From the named statistics: a policy that saves them has all that `y` needs.
    y = _normalize(transform, operands, origin, moments)
    if transform.activation is None:
        operands = operands._replace(bias=None, residual=None)
    elif transform.activation is jax.nn.relu and operands.residual is not None:
        operands = operands._replace(bias=None, residual=None, output=y)
    dy, dmean, dvar = _tangents(
        transform, operands, origin, moments, doperands._replace(mask=None)
    )
    dmoments = Moments(dmean, dvar, jnp.zeros_like(moments.count))
    return (y, origin, moments), (dy, jnp.zeros_like(origin), dmoments)


def _tangents(transform, operands, origin, moments, doperands):
    arguments = operands, origin, moments, doperands
    alike = len({varying_axes(leaf) for leaf in jax.tree.leaves(arguments)}) == 1
    if transform.reduction.axis_name is None and operands.mask is None and alike:
        return _tangent_map(*arguments, transform=transform)
    return _tangent_map_reference(*arguments, transform=transform)


def _tangent_map_reference(operands, origin, moments, doperands, *, transform):
    """The tangents of output, mean and variance; linear in `doperands`."""
    reduction = transform.reduction
    params = _channel_params(transform, operands, origin, moments.mean, moments.var)
    dx = transform.cast(doperands.x)
    arrays = jax.tree.leaves((operands, params, dx, doperands.residual))
    (dx,) = _vary_like(arrays, dx)
    summed = operands._replace(residual=None, output=None, consts=())
    sums = _tangent_sums(summed, params, dx, transform=transform)
    if reduction.axis_name is not None:
        sums = reduction.total(jnp.stack(sums))
    first, second = (total / safe_count(moments.count) for total in sums)
    covariance = second - moments.mean * first

    inv_std, multiplier = map(reduction.squeeze, (params.inv_std, params.multiplier))
    dbias, dscale = (
        jnp.zeros_like(multiplier) if tangent is None else transform.cast(tangent)
        for tangent in (doperands.bias, doperands.scale)
    )
    offset = dbias - multiplier * first
    slope = inv_std * dscale - multiplier * jnp.square(inv_std) * covariance
    offset, slope = _vary_like(arrays, offset, slope)
    slope = slope - 0.5 * multiplier * jnp.square(inv_std) * doperands.epsilon
    dresidual = doperands.residual
    if dresidual is not None:
        (dresidual,) = _vary_like(arrays, dresidual)
    tangents = _ElementwiseTangents(
        dx,
        reduction.expand(offset),
        reduction.expand(slope),
        dresidual,
        doperands.consts,
    )
    (dy,) = _elementwise_tangent_map(operands, params, tangents, transform=transform)
    return [dy, first, 2 * covariance]


def _tangent_map_transpose(
    cotangents, operands, origin, moments, doperands, *, transform
):
    return _vjp(
        cotangents, operands, origin, moments, transform=transform, types=doperands
    )


def _vjp_reference(cotangents, operands, origin, moments, *, transform, types):
    """The cotangents of the leaves of `doperands`."""

    def tangents(doperands):
        return _tangent_map_reference(
            operands, origin, moments, doperands, transform=transform
        )

    return jax.tree.leaves(jax.linear_transpose(tangents, types)(cotangents))


def _vjp_on_cpu(cotangents, operands, origin, moments, *, transform, types):
    dy, dmean, dvar = cotangents
    added = None if operands.output is None else types.residual
    if not _kernel_supports(transform, operands, added):
        return _vjp_reference(
            cotangents, operands, origin, moments, transform=transform, types=types
        )
    channels = _kernel_channels(operands, origin, moments.mean, moments.var)
    dx, depsilon, dscale, dbias, *dresidual = _cpu.gradient(
        dy,
        operands.x,
        [*channels, dmean, dvar],
        operands.output,
        transform.activation,
    )
    # Without an activation, the gradient of a residual is that of the output.
    (dresidual,) = dresidual or [dy]
    # In the order of the leaves of `types`.
    gradients = {"x": dx, "epsilon": depsilon, "scale": dscale, "bias": dbias}
    gradients["residual"] = dresidual
    wanted = types._asdict()
    return [
        gradient.astype(wanted[name].dtype)
        for name, gradient in gradients.items()
        if wanted[name] is not None
    ]


_tangent_map = operation(
    "batch_norm_tangent_map", _tangent_map_reference, transpose=_tangent_map_transpose
)
_vjp = operation("batch_norm_vjp", _vjp_reference, cpu=OneDevice(_vjp_on_cpu))


def _kernel_supports(transform, operands, residual):
    return transform.reduction.group_size is None and _cpu.kernel_supports(
        operands.x,
        transform.reduction.axes,
        transform.compute_dtype,
        dtype=transform.dtype,
        activation=transform.activation,
        mask=operands.mask,
        residual=residual,
    )


def _kernel_channels(operands, *statistics):
    """Origin, mean and var, epsilon, scale and bias, as the kernels take them."""
    like = statistics[0]
    scale = jnp.ones_like(like) if operands.scale is None else operands.scale
    bias = jnp.zeros_like(like) if operands.bias is None else operands.bias
    channels = (*statistics, operands.epsilon, scale, bias)
    return [channel.astype(jnp.float32) for channel in channels]


def _tangent_sums_reference(operands, params, dx, *, transform):
    """The sums of dx and of dx * (x - origin), weighted where there is a mask."""
    distance = _distance(transform, operands, params)
    if operands.mask is not None:
        weight = operands.mask.astype(transform.compute_dtype)
        dx = jnp.where(mask_to_bool(operands.mask), weight * dx, 0)
    return [transform.reduction.sum(dx), transform.reduction.sum(dx * distance)]


def _tangent_sums_transpose(cotangents, operands, params, dx, *, transform):
    dfirst, dsecond = map(transform.reduction.expand, cotangents)
    if operands.mask is None and operands.x.dtype.itemsize < 4:
        # x - origin is multiplied out, because XLA for a TPU v6e otherwise writes the
        # gradient to memory before a convolution reads it. `x` in 16 bits has no digits
        # to lose by this in float32.
        dx = transform.cast(operands.x) * dsecond + (dfirst - params.origin * dsecond)
    else:
        dx = _distance(transform, operands, params) * dsecond + dfirst
    if operands.mask is not None:
        weight = operands.mask.astype(transform.compute_dtype)
        dx = jnp.where(mask_to_bool(operands.mask), weight * dx, 0)
    return [dx]


_tangent_sums = operation(
    "batch_norm_tangent_sums",
    _tangent_sums_reference,
    transpose=_tangent_sums_transpose,
)


class _ElementwiseTangents(NamedTuple):
    """Tangents of the arrays, and per-channel terms of the output's tangent.

    Attributes:
        x: in the dtype of the computation.
        offset: added to each value of a channel, of the rank of the input.
        slope: likewise, times x - origin - mean.
        residual: in the dtype of the residual.
        consts: of the arrays that the activation depends on besides its argument.
    """

    x: jax.Array
    offset: jax.Array
    slope: jax.Array
    residual: jax.Array | None
    consts: tuple[jax.Array, ...]


def _elementwise_tangent_map_reference(operands, params, tangents, *, transform):
    distance = _distance(transform, operands, params)
    dx = _unless_hidden(transform, operands, params, tangents.x)
    centered = distance - params.mean
    dz = params.multiplier * dx + centered * tangents.slope + tangents.offset
    if tangents.residual is not None:
        dz = dz + transform.cast(tangents.residual)
    if operands.output is not None:
        dz = jnp.where(operands.output > 0, dz, 0)
    elif transform.activation is not None:
        z = _preactivation(transform, operands, params, distance)
        inputs, dinputs = (z, *operands.consts), (dz, *tangents.consts)
        dz = jax.jvp(transform.activation, inputs, dinputs)[1]
    return [dz.astype(transform.dtype)]


def _elementwise_tangent_map_transpose(
    cotangents, operands, params, tangents, *, transform
):
    residual = tangents.residual
    return _elementwise_vjp(
        cotangents,
        operands,
        params,
        transform=transform,
        residual_dtype=None if residual is None else residual.dtype,
    )


def _elementwise_vjp_reference(
    cotangents, operands, params, *, transform, residual_dtype, on_gpu=False
):
    """The cotangents of `_ElementwiseTangents`, leaf by leaf.

    Two sums and the gradient of `x` need the gradient dz of the preactivation. Its form
    decides whether XLA can fuse it into both, without writing it to memory or keeping
    anything of the forward pass for it. The best form differs between platforms, and is
    read off compiled programs (docs/library/compiled.md).

    With a residual, dz is written in any case: it is the residual's gradient. A TPU
    selects the positive values in the dtype of `dy`, and so does a GPU. On the GPU, the
    barrier keeps XLA from tracing the comparison back to the operands of `output`.

    Without a residual, XLA for GPUs keeps any boolean from the forward pass, because
    one byte per value costs less than to recompute it. A float32 factor costs four
    bytes, and is not kept.

    Without an activation, `dy` is often the select of a ReLU outside. In 16 bits, XLA
    for GPUs then writes it to memory, in the same pass as a sum if that sum stands
    alone: the barrier keeps that sum apart from the other. In float32 it recomputes
    `dy`.
    """
    (dy,) = cotangents
    dz, *dconsts = _preactivation_vjp(transform, dy, operands, params, on_gpu)
    alone = dz
    if transform.activation is None and on_gpu and dz.dtype.itemsize < 4:
        alone = lax.optimization_barrier(dz)
    centered = _centered(transform, operands, params)
    terms = transform.cast(alone), transform.cast(dz) * centered
    sums = map(transform.reduction.expanded_sum, terms)
    dx, *dresidual = _arrays_vjp(transform, operands, params, dz, residual_dtype)
    return [dx, *sums, *dresidual, *dconsts]


def _arrays_vjp(transform, operands, params, dz, residual_dtype):
    dx = params.multiplier * transform.cast(dz)
    dx = _unless_hidden(transform, operands, params, dx)
    return [dx] if residual_dtype is None else [dx, dz.astype(residual_dtype)]


def _unless_hidden(transform, operands, params, value):
    """`value`, but 0 where a mask hides an input that is not finite."""
    if operands.mask is None:
        return value
    distance = transform.cast(operands.x) - params.origin
    return jnp.where(_hidden(distance, operands.mask), 0, value)


def _preactivation_vjp(transform, dy, operands, params, on_gpu=False):
    """The gradient dz of the preactivation, and those of `operands.consts`."""
    if operands.output is not None:
        output = operands.output
        if on_gpu:
            output = lax.optimization_barrier(output)
        return [jnp.where(output > 0, dy, 0)]
    if transform.activation is None:
        return [dy]
    distance = _distance(transform, operands, params)
    z = _preactivation(transform, operands, params, distance)
    if transform.activation is not jax.nn.relu:
        vjp = jax.vjp(transform.activation, z, *operands.consts)[1]
        return vjp(transform.cast(dy))
    if on_gpu:
        return [transform.cast(dy) * jnp.maximum(jnp.sign(z), 0)]
    return [jnp.where(z > 0, dy, 0)]


def _elementwise_vjp_on_cpu(cotangents, operands, params, *, transform, residual_dtype):
    # Only rows and channels can be cut into blocks.
    whole = operands.mask, operands.residual, transform.reduction.group_size
    if operands.consts or any(each is not None for each in whole):
        return _elementwise_vjp_reference(
            cotangents,
            operands,
            params,
            transform=transform,
            residual_dtype=residual_dtype,
        )

    def terms(dy, x, output, *params):
        part, params = operands._replace(x=x, output=output), ChannelParams(*params)
        (dz,) = _preactivation_vjp(transform, dy, part, params)
        return transform.cast(dz), transform.cast(dz) * _centered(
            transform, part, params
        )

    (dy,) = cotangents
    rows = dy, operands.x, operands.output
    sums = sum_in_blocks(terms, rows, params, transform.reduction)
    (dz,) = _preactivation_vjp(transform, dy, operands, params)
    dx, *dresidual = _arrays_vjp(transform, operands, params, dz, residual_dtype)
    return [dx, *map(transform.reduction.expand, sums), *dresidual]


_elementwise_tangent_map = operation(
    "batch_norm_elementwise_tangent_map",
    _elementwise_tangent_map_reference,
    transpose=_elementwise_tangent_map_transpose,
)
_elementwise_vjp = operation(
    "batch_norm_elementwise_vjp",
    _elementwise_vjp_reference,
    cpu=OneDevice(_elementwise_vjp_on_cpu),
    gpu=functools.partial(_elementwise_vjp_reference, on_gpu=True),
)


def _vary_like(arrays, *values):
    """Values of one shape, varying over all mesh axes that the arrays vary over.

    They are stacked, and not yet broadcast, so that the transpose is one sum over
    devices of a per-channel array.
    """
    needed = frozenset().union(*map(varying_axes, arrays))
    if all(varying_axes(value) >= needed for value in values):
        return values
    joined = jnp.stack(values)
    missing = tuple(needed - varying_axes(joined))
    return lax.pcast(joined, missing, to="varying") if missing else joined
