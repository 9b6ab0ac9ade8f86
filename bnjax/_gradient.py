"""Normalization and its derivative in the closed form of the paper.

The derivative is a linear map from the tangents of the inputs to those of the outputs.
The map is arranged as

    dy = a * dx + xhat * A + B,      a = scale / sqrt(var + epsilon),
    A = dscale - a * mean(xhat * dx),      B = dbias - a * mean(dx),

so that its transpose is the paper's backward pass, in which one sum over the batch for
scale and one for bias serve the gradient of x as well, in one collective where devices
share statistics:

    dscale = sum(dy * xhat),      dbias = sum(dy),
    dx = a * (dy - dbias / m - xhat * dscale / m).

JAX transposes the means, A and B. The transpose of the rest, with its two sums, is
written out (`_gather`): JAX would keep in memory, in float32, what the sums share.

The map is rematerialized: of what the forward pass computed, only the inputs of the map
are kept, and they are `x` itself and per-channel vectors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _cpu
from bnjax._affine import (
    Channels,
    Operands,
    Transform,
    channels_of,
    distance_of,
    hoist_activation,
    kernel_channels,
    normalized,
    output,
    preactivation,
    served,
)
from bnjax._operation import operation
from bnjax._statistics import (
    Moments,
    live,
    moments_about_origin,
    named,
    positive,
)
from bnjax._sums import batch_sums

_remat = functools.partial(jax.checkpoint, prevent_cse=False)


def normalize_by_batch(
    transform: Transform, operands: Operands
) -> tuple[jax.Array, jax.Array, Moments]:
    """Normalize by the statistics of the batch itself (Algorithm 1).

    Returns:
        The output, and the origin and Moments of `moments_about_origin`.
    """
    return _by_batch_jit(*hoist_activation(transform, operands))


def normalize_by(
    transform: Transform, operands: Operands, mean: jax.Array, var: jax.Array
) -> jax.Array:
    """Normalize by given statistics, an affine map of each channel (Algorithm 2)."""
    transform, operands = hoist_activation(transform, operands)

    @_remat
    def affine(operands, mean, var):
        return output(transform, operands, channels_of(transform, operands, mean, var))

    return affine(operands, mean, var)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_batch(transform, operands):
    origin, moments = moments_about_origin(
        operands.x, operands.mask, transform.reduction, transform.compute_dtype
    )
    return _normalized(transform, operands, origin, moments), origin, moments


# One trace serves every layer of the same shapes.
_by_batch_jit = jax.jit(_by_batch, static_argnums=0)


@_by_batch.defjvp
def _by_batch_jvp(transform, primals, tangents):
    (operands,), (doperands,) = primals, tangents
    _, *statistics = _by_batch(transform, operands)
    origin, moments = named(statistics)
    # From the named ones, so that a policy which saves them has all that `y` needs.
    y = _remat(functools.partial(_normalized, transform))(operands, origin, moments)
    if transform.activation is None:
        operands = operands._replace(bias=None, residual=None)
    dy, dmean, dvar = _remat(functools.partial(_tangents, transform))(
        operands, origin, moments, doperands._replace(mask=None)
    )
    dmoments = Moments(dmean, dvar, jnp.zeros_like(moments.count))
    return (y, origin, moments), (dy, jnp.zeros_like(origin), dmoments)


def _normalized(transform, operands, origin, moments):
    (y,) = normalized(operands, origin, moments.mean, moments.var, transform=transform)
    return y


def _tangents(transform, operands, origin, moments, doperands):
    arguments = operands, origin, moments, doperands
    alike = len({_varying(leaf) for leaf in jax.tree.leaves(arguments)}) == 1
    reduction = transform.reduction
    if reduction.axis_name is None and operands.mask is None and alike:
        return _local_tangents(*arguments, transform=transform)
    return _tangents_plainly(*arguments, transform=transform)


def _tangents_plainly(operands, origin, moments, doperands, *, transform):
    reduction = transform.reduction
    channels = channels_of(transform, operands, moments.mean, moments.var, origin)
    distance, hidden = distance_of(transform, operands, channels)
    xhat = distance * channels.inverse
    dx = transform.cast(doperands.x)
    weighted = dx
    if operands.mask is not None:
        dx = jnp.where(hidden, 0, dx)
        weight = operands.mask.astype(transform.compute_dtype)
        weighted = jnp.where(live(operands.mask), weight * dx, 0)

    sums = [jnp.sum(weighted, reduction.axes), jnp.sum(weighted * xhat, reduction.axes)]
    if reduction.axis_name is not None:
        sums = reduction.total(jnp.stack(sums))
    mean_dx, mean_xhat_dx = (total / positive(moments.count) for total in sums)
    inverse, gain = (
        lax.squeeze(value, reduction.axes)
        for value in (channels.inverse, channels.gain)
    )
    dmean, dvar = mean_dx, 2 * mean_xhat_dx / inverse

    dbias, dscale = (
        jnp.zeros_like(gain) if tangent is None else transform.cast(tangent)
        for tangent in (doperands.bias, doperands.scale)
    )
    arrays = jax.tree.leaves((operands, channels, dx, doperands.residual))
    dbias = dbias - gain * mean_dx
    dscale = dscale - gain * mean_xhat_dx
    dbias, dgain = _all_varying_like(arrays, dbias, dscale)
    dgain = dgain - 0.5 * gain * inverse * doperands.epsilon
    (dx,) = _all_varying_like(arrays, dx)
    dresidual = doperands.residual
    if dresidual is not None:
        (dresidual,) = _all_varying_like(arrays, dresidual)
    tangents = _Tangents(
        dx, reduction.expand(dbias), reduction.expand(dgain), dresidual
    )
    if operands.mask is None and not operands.consts:
        spread = _spread
    else:
        spread = functools.partial(_spread_plainly, dconsts=doperands.consts)
    (dy,) = spread(operands, channels, tangents, transform=transform)
    return [dy, dmean, dvar]


def _pull_back(cotangents, operands, origin, moments, doperands, *, transform):
    """The transpose of `_tangents_plainly`."""
    return _local_gradient(
        cotangents, operands, origin, moments, transform=transform, types=doperands
    )


def _pull_back_plainly(cotangents, operands, origin, moments, *, transform, types):
    def tangents(doperands):
        return _tangents_plainly(
            operands, origin, moments, doperands, transform=transform
        )

    return jax.tree.leaves(jax.linear_transpose(tangents, types)(cotangents))


def _pull_back_on_cpu(cotangents, operands, origin, moments, *, transform, types):
    dy, dmean, dvar = cotangents
    if not served(transform, operands):
        return _pull_back_plainly(
            cotangents, operands, origin, moments, transform=transform, types=types
        )
    channels = kernel_channels(operands, origin, moments.mean, moments.var)
    y, activation = None, transform.activation
    if operands.residual is not None:
        arguments = operands.x, channels, operands.residual, activation
        y = _cpu.output(*arguments, transform.dtype)
    dx, depsilon, dscale, dbias, *dresidual = _cpu.gradient(
        dy, operands.x, [*channels, dmean, dvar], y, activation
    )
    gradients = {"x": dx, "epsilon": depsilon, "scale": dscale, "bias": dbias}
    # Without an activation the residual is not among the operands.
    (gradients["residual"],) = dresidual or [dy]
    wanted = types._asdict()
    return [
        gradient.astype(wanted[name].dtype)
        for name, gradient in gradients.items()
        if wanted[name] is not None
    ]


_local_tangents = operation(
    "batch_norm_tangents", _tangents_plainly, transpose=_pull_back
)
_local_gradient = operation(
    "batch_norm_gradient", _pull_back_plainly, on_cpu=_pull_back_on_cpu
)


class _Tangents(NamedTuple):
    """Those of input and residual, and what a whole channel adds to an output's."""

    x: jax.Array
    bias: jax.Array
    gain: jax.Array
    residual: jax.Array | None


def _spread_plainly(operands, channels, tangents, *, transform, dconsts=()):
    distance, _ = distance_of(transform, operands, channels)
    xhat = distance * channels.inverse
    dz = channels.gain * tangents.x + xhat * tangents.gain + tangents.bias
    if tangents.residual is not None:
        dz = dz + transform.cast(tangents.residual)
    if transform.activation is not None:
        z = preactivation(transform, operands, channels, distance)
        inputs, dinputs = (z, *operands.consts), (dz, *dconsts)
        dz = jax.jvp(transform.activation, inputs, dinputs)[1]
    return [dz.astype(transform.dtype)]


def _gather(cotangents, operands, channels, tangents, *, transform):
    """The transpose of `_spread_plainly`: the backward pass, with one pass for sums."""

    def pulled_back(dy, x, residual, *channels):
        part, channels = operands._replace(x=x, residual=residual), Channels(*channels)
        distance, _ = distance_of(transform, part, channels)
        dz = transform.cast(dy)
        if transform.activation is not None:
            z = preactivation(transform, part, channels, distance)
            (dz,) = jax.vjp(transform.activation, z)[1](dz)
        return dz, distance * channels.inverse

    def terms(*arrays):
        dz, xhat = pulled_back(*arrays)
        return dz, dz * xhat

    reduction = transform.reduction
    rows = (*cotangents, operands.x, operands.residual)
    dbias, dgain = map(
        reduction.expand, batch_sums(terms, rows, channels, reduction.axes)
    )
    dz, _ = pulled_back(*rows, *channels)
    residual = tangents.residual
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return _Tangents(channels.gain * dz, dbias, dgain, dresidual)


_spread = operation("batch_norm_tangent", _spread_plainly, transpose=_gather)


def _all_varying_like(arrays, *values):
    """Values of one shape, varying over all mesh axes that the arrays vary over.

    They are joined, and not yet broadcast, so that the transpose is one sum over
    devices of a per-channel array.
    """
    needed = frozenset().union(*map(_varying, arrays))
    if all(_varying(value) >= needed for value in values):
        return values
    joined = jnp.stack(values)
    missing = tuple(needed - _varying(joined))
    return lax.pcast(joined, missing, to="varying") if missing else joined


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying
