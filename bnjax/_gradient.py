"""Normalization and its derivative in the closed form of the paper.

The derivative is written once, as the linear map from the tangents of the inputs to
those of the outputs, and JAX transposes it for reverse mode. The map is arranged as

    dy = a * dx + xhat * A + B,      a = scale / sqrt(var + epsilon),
    A = dscale - a * mean(xhat * dx),      B = dbias - a * mean(dx),

so that its transpose is the paper's backward pass, in which one sum over the batch for
scale and one for bias serve the gradient of x as well, in one collective where devices
share statistics:

    dscale = sum(dy * xhat),      dbias = sum(dy),
    dx = a * (dy - dbias / m - xhat * dscale / m).

The map is rematerialized: of what the forward pass computed, only the inputs of the map
are kept, and they are `x` itself and per-channel vectors.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax._statistics import Moments, Reduction, live, moments_about_origin, named

_remat = functools.partial(jax.checkpoint, prevent_cse=False)


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


def normalize_by_batch(
    transform: Transform, operands: Operands
) -> tuple[jax.Array, jax.Array, Moments]:
    """Normalize by the statistics of the batch itself (Algorithm 1).

    Returns:
        The output, and the origin and Moments of `moments_about_origin`.
    """
    return _by_batch_jit(*_hoist(transform, operands))


def normalize_by(
    transform: Transform, operands: Operands, mean: jax.Array, var: jax.Array
) -> jax.Array:
    """Normalize by given statistics, an affine map of each channel (Algorithm 2)."""
    transform, operands = _hoist(transform, operands)

    @_remat
    def affine(operands, mean, var):
        mean, var = transform.cast(mean), transform.cast(var)
        distance, _ = _distance(transform, operands, mean)
        inverse = lax.rsqrt(var + operands.epsilon)
        return _output(transform, operands, distance, inverse)

    return affine(operands, mean, var)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_batch(transform, operands):
    origin, moments = moments_about_origin(
        transform.cast(operands.x), operands.mask, transform.reduction
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
    distance, _ = _distance(transform, operands, origin, moments.mean)
    inverse = lax.rsqrt(moments.var + operands.epsilon)
    return _output(transform, operands, distance, inverse)


def _tangents(transform, operands, origin, moments, doperands):
    reduction, expand = transform.reduction, transform.reduction.expand
    distance, hidden = _distance(transform, operands, origin, moments.mean)
    inverse = lax.rsqrt(moments.var + operands.epsilon)
    xhat = distance * expand(inverse)
    dx = transform.cast(doperands.x)
    weighted = dx
    if operands.mask is not None:
        dx = jnp.where(hidden, 0, dx)
        weight = operands.mask.astype(transform.compute_dtype)
        weighted = jnp.where(live(operands.mask), weight * dx, 0)

    sums = [jnp.sum(weighted, reduction.axes), jnp.sum(weighted * xhat, reduction.axes)]
    count = jnp.where(moments.count > 0, moments.count, 1)
    means = reduction.total(jnp.stack(sums)) / count[None]
    dmean, dvar = means[0], 2 * means[1] / inverse

    a = _gain(transform, operands, inverse)
    dbias = jnp.zeros_like(a) if doperands.bias is None else doperands.bias
    dscale = jnp.zeros_like(a) if doperands.scale is None else doperands.scale
    dparams = jnp.stack([transform.cast(dbias), transform.cast(dscale)])
    change = _varying_like(distance, dparams - a[None] * means)
    dgain = change[1] - 0.5 * a * inverse * doperands.epsilon
    dz = expand(a) * dx + xhat * expand(dgain) + expand(change[0])
    if doperands.residual is not None:
        dz = dz + transform.cast(doperands.residual)
    if transform.activation is not None:
        z = _affine(transform, operands, distance, inverse)
        inputs, dinputs = (z, *operands.consts), (dz, *doperands.consts)
        dz = jax.jvp(transform.activation, inputs, dinputs)[1]
    return dz.astype(transform.dtype), dmean, dvar


def _distance(transform, operands, *centres) -> tuple[jax.Array, Any]:
    """`x` less the centres, 0 where a mask hides what is not finite, and where it does.

    Each centre is subtracted by itself: their sum would round where the mean is large.
    """
    distance = transform.cast(operands.x)
    for centre in centres:
        distance = distance - transform.reduction.expand(centre)
    if operands.mask is None:
        return distance, None
    hidden = _hidden(distance, operands.mask)
    return jnp.where(hidden, 0, distance), hidden


def _gain(transform, operands, inverse):
    scale = transform.cast(operands.scale)
    return inverse if scale is None else scale * inverse


def _affine(transform, operands, distance, inverse):
    expand = transform.reduction.expand
    z = distance * expand(_gain(transform, operands, inverse))
    if operands.bias is not None:
        z = z + expand(transform.cast(operands.bias))
    if operands.residual is not None:
        residual = transform.cast(operands.residual)
        if operands.mask is not None:
            residual = jnp.where(_hidden(residual, operands.mask), 0, residual)
        z = z + residual
    return z


def _output(transform, operands, distance, inverse):
    z = _affine(transform, operands, distance, inverse)
    if transform.activation is not None:
        z = transform.activation(z, *operands.consts)
    return z.astype(transform.dtype)


def _hidden(value, mask):
    # Squared, because a value that overflows only later harms as much as an inf.
    return ~live(mask) & ~jnp.isfinite(jnp.square(value))


def _varying_like(x, value):
    """`value` as varying over the mesh axes that `x` varies over.

    Done before the broadcast, so that the transpose is one sum over devices of a
    per-channel array.
    """
    varying, present = (jax.typeof(a).manual_axis_type.varying for a in (x, value))
    missing = tuple(varying - present)
    return lax.pcast(value, missing, to="varying") if missing else value


def _hoist(transform, operands):
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
