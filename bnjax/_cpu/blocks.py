"""Sums over a batch in blocks: for a CPU without a C compiler."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Sizes of arrays and of blocks, in elements. A small block and its sums stay in the
# nearest cache of a core. On a large block XLA uses several cores, as on any block of
# halves cut from a large array. Below FEW a loop saves less time than its compilation
# takes.
FEW, MANY_HALVES, LARGE = 1 << 15, 1 << 17, 1 << 20
SMALL_BLOCK, HALVES_BLOCK, BLOCK = 1 << 13, 1 << 15, 1 << 17
# Parts of a block that are added to the sums at once, which reads and writes the sums
# once.
PARTS = 4
# Number of adjacent values that keep the vector units of a core busy.
WIDTH = 128

Terms = Callable[..., Sequence[jax.Array]]


def sum_in_blocks(
    terms: Terms,
    rows: Sequence[jax.Array | None],
    channels: Sequence[jax.Array | None],
    axes: tuple[int, ...],
) -> list[jax.Array]:
    """Sum over a batch the terms that an elementwise function computes.

    jnp.sum(term, axes) for each term of terms(*rows, *channels). XLA for CPU would
    first write to memory what two of the sums have in common: a float32 copy of a
    bfloat16 input, or the distance from the origin. Here the sums are taken over blocks
    of the batch, so that these values stay in the cache.

    Args:
        terms: elementwise; the same for a part of the batch as for all of it.
        rows: arrays of one shape, of any dtype; None for an array that is not used.
        channels: arrays of the same rank, of length 1 along `axes`; or None.
        axes: of the reduction, ascending.

    Returns:
        The sums, of the dtype of the terms, without `axes`.
    """
    arrays = jax.tree.leaves(rows)
    shape, size = arrays[0].shape, arrays[0].size
    leading = axes == tuple(range(len(axes)))
    if size < FEW or not leading:
        return [jnp.sum(term, axes) for term in terms(*rows, *channels)]
    examples, features = math.prod(shape[: len(axes)]), shape[len(axes) :]
    # Examples of few features are joined to one long row.
    limit = max(1, WIDTH // math.prod(features))
    joined = max(n for n in range(1, limit + 1) if examples % n == 0)
    width, count = joined * math.prod(features), examples // joined
    if count < 2 * PARTS:
        return [jnp.sum(term, axes) for term in terms(*rows, *channels)]
    block = _block(size, halves=any(_half(array) for array in arrays))
    length = _divisor(count // PARTS, max(1, block // (PARTS * width)))
    blocks, rest = divmod(count, PARTS * length)
    rows = jax.tree.map(lambda row: row.reshape(count, width), rows)
    channels = jax.tree.map(lambda c: jnp.tile(c.reshape(1, -1), joined), channels)

    def part(rows, start):
        def cut(array):
            at, sizes = (start, jnp.zeros_like(start)), (length, width)
            return lax.dynamic_slice(array, at, sizes, allow_negative_indices=False)

        return terms(*jax.tree.map(lambda row: cut_of(row, cut), rows), *channels)

    def add(state):
        start, sums = state
        # A barrier in each step: XLA would convert the whole array before the loop.
        held, here = lax.optimization_barrier((rows, start))
        for step in range(PARTS):
            more = part(held, here + step * length)
            sums = [s + term for s, term in zip(sums, more, strict=True)]
        return start + PARTS * length, sums

    first = 0, [_zeros(term) for term in jax.make_jaxpr(part)(rows, 0).out_avals]
    end = blocks * PARTS * length
    _, sums = lax.while_loop(lambda state: state[0] < end, add, first)
    sums = [jnp.sum(s.reshape(-1, *features), 0) for s in sums]
    if rest:
        last = jax.tree.map(lambda row: row[end:], rows)
        more = [term.reshape(-1, *features) for term in terms(*last, *channels)]
        sums = [s + jnp.sum(term, 0) for s, term in zip(sums, more, strict=True)]
    return sums


def _block(size: int, halves: bool) -> int:
    """The approximate number of elements of an array in a block."""
    if size >= LARGE:
        return BLOCK
    return HALVES_BLOCK if halves and size >= MANY_HALVES else SMALL_BLOCK


def _divisor(number: int, limit: int) -> int:
    """The largest divisor up to `limit`; `limit` if no divisor is above half of it."""
    divisors = (d for d in range(limit, limit // 2, -1) if number % d == 0)
    return next(divisors, limit)


def _zeros(like: Any) -> jax.Array:
    zeros = jnp.zeros(like.shape, like.dtype)
    varying = tuple(like.manual_axis_type.varying)
    return lax.pcast(zeros, varying, to="varying") if varying else zeros


def _half(array: jax.Array) -> bool:
    return array.dtype.itemsize == 2


def cut_of(x: jax.Array, cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`cut(x)`, without the float32 copy of all of `x` that XLA would make of halves.

    Args:
        x: of any dtype.
        cut: takes a part of an array, whatever the dtype.
    """
    if not _half(x):
        return cut(x)
    part = cut(lax.bitcast_convert_type(x, jnp.uint16))
    return lax.bitcast_convert_type(part, x.dtype)
