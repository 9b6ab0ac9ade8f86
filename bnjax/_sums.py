"""Sums over a batch of what is computed from it, in a form that XLA does well."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from bnjax._operation import operation

# Of elements: a block and the sums over it stay in the cache of a core, as all of an
# array that is not large does.
BLOCK = 1 << 17
LARGE = 1 << 21

Terms = Callable[..., Sequence[jax.Array]]


def batch_sums(
    terms: Terms,
    rows: Sequence[jax.Array | None],
    channels: Sequence[jax.Array | None],
    axes: tuple[int, ...],
) -> list[jax.Array]:
    """Sum over a batch the terms that an elementwise function computes.

    jnp.sum(term, axes) for each term of terms(*rows, *channels). On a CPU, XLA would
    first write to memory what two of the sums have in common: a float32 copy of a
    bfloat16 input, or the distance from the origin. There the sums are taken over
    blocks of the batch, which leaves it in the cache.

    Args:
        terms: elementwise; the same for a part of the batch as for all of it.
        rows: arrays of one shape, of any dtype; None for what there is not.
        channels: arrays of the same rank, of length 1 along `axes`; or None.
        axes: of the reduction, ascending.

    Returns:
        The sums, of the dtype of the terms, without `axes`.
    """
    return _batch_sums(rows, channels, terms=terms, axes=axes)


def _plain(rows, channels, *, terms, axes):
    return [jnp.sum(term, axes) for term in terms(*rows, *channels)]


def _in_blocks(rows, channels, *, terms, axes):
    first, *_ = jax.tree.leaves(rows)
    examples = math.prod(first.shape[: len(axes)])
    blocks = min(first.size // BLOCK, examples)
    leading = axes == tuple(range(len(axes)))
    if first.size < LARGE or blocks < 2 or not leading:
        return _plain(rows, channels, terms=terms, axes=axes)
    length = -(-examples // blocks)
    blocks, rest = divmod(examples, length)
    features = first.shape[len(axes) :]
    rows = jax.tree.map(lambda row: row.reshape(examples, *features), rows)
    channels = jax.tree.map(lambda channel: lax.squeeze(channel, axes[1:]), channels)

    def block(index):
        # Held fast in each step: XLA would convert the whole array before the loop.
        held, start = lax.optimization_barrier((rows, index * length))
        return terms(
            *jax.tree.map(lambda row: _cut(row, start, length), held), *channels
        )

    def add(index, sums):
        return [s + term for s, term in zip(sums, block(index), strict=True)]

    sums = [jnp.sum(s, 0) for s in lax.fori_loop(1, blocks, add, list(block(0)))]
    if rest:
        last = jax.tree.map(lambda row: row[blocks * length :], rows)
        terms_left = terms(*last, *channels)
        sums = [s + jnp.sum(t, 0) for s, t in zip(sums, terms_left, strict=True)]
    return sums


def _cut(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """Some rows of `x`, without the copy XLA makes of bfloat16 for want of a slice."""
    half = x.dtype.itemsize == 2
    bits = lax.bitcast_convert_type(x, jnp.uint16) if half else x
    part = lax.dynamic_slice_in_dim(bits, start, length)
    return lax.bitcast_convert_type(part, x.dtype) if half else part


_batch_sums = operation("batch_sums", _plain, on_cpu=_in_blocks)
