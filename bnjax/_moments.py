"""Mean, variance and count of a batch, and the one rule that merges them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax import _cpu
from bnjax._cpu import blocks
from bnjax._primitive import OneDevice, operation

AxisName = str | tuple[str, ...]

# The name under which a remat policy can save the statistics of a batch.
CHECKPOINT_NAME = "batch_stats"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchStats:
    """Running mean and variance of a batch-normalized layer.

    Attributes:
        mean: running mean, float32 (float64 for float64 input), shape (features,).
        var: running variance, of the same dtype and shape.

    Examples:
        >>> import bnjax
        >>> bnjax.BatchStats.init(3)
        BatchStats(mean=Array([0., 0., 0.], dtype=float32), var=Array([1., 1., 1.], dtype=float32))

    References:
        Ioffe & Szegedy (2015), section 3.1 and Algorithm 2.
    """  # noqa: E501 - the output of a doctest is one line

    mean: jax.Array
    var: jax.Array

    @classmethod
    def init(cls, features: int | Sequence[int], dtype=jnp.float32) -> "BatchStats":
        """Initial statistics, before the first update: mean 0, variance 1.

        Args:
            features: number of channels, or the shape of the feature axes.
            dtype: float32, or float64 for float64 inputs.

        Returns:
            BatchStats of arrays of shape (features,).

        Examples:
            >>> import bnjax
            >>> bnjax.BatchStats.init(2).var
            Array([1., 1.], dtype=float32)
        """
        return cls(jnp.zeros(features, dtype), jnp.ones(features, dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    r"""Mean, biased variance and count of one batch, shard, micro-batch or group.

    Attributes:
        mean: $\sum_i w_i x_i / n$, float32 or float64, shape (features,).
        var: $\sum_i w_i (x_i - \mu)^2 / n$, of the same dtype and shape.
        count: $n = \sum_i w_i$, the number of values in each channel, of the same dtype
            and shape.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> two = bnjax.moments(jnp.array([[1.0], [2.0]]))
        >>> one = bnjax.moments(jnp.array([[6.0]]))
        >>> both = two.merge(one)
        >>> print(both.mean, both.var, both.count)
        [3.] [4.666667] [3.]
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array

    def merge(self, *others: "Moments") -> "Moments":
        r"""Moments of the union of all the values that these moments describe.

        $$
        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)
        $$

        No digits cancel if the means are large compared with their differences. Parts
        of count 0 change nothing.

        Args:
            *others: moments of other values, arrays of the same shape and dtype.

        Returns:
            The merged Moments.

        References:
            Chan, Golub & LeVeque (1983), "Algorithms for computing the sample
            variance: analysis and recommendations".
        """
        parts = (self, *others)
        origin = jnp.zeros_like(self.mean)
        for part in parts:
            origin = jnp.where(part.count > 0, part.mean, origin)
        about_origin = [Moments(p.mean - origin, p.var, p.count) for p in parts]
        joined = _merge_about_zero(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *about_origin),
            lambda sums: jnp.sum(sums, axis=1),
        )
        return Moments(origin + joined.mean, joined.var, joined.count)


@dataclass(frozen=True)
class Reduction:
    """Which values share statistics: axes of the array, and devices.

    With `group_size`, groups of that many consecutive rows of axis 0 share statistics,
    and axis 0 is one of the axes. A per-channel array then has a leading axis of
    groups. `x` itself keeps its shape, and is reshaped only to be summed: XLA for a TPU
    fuses no convolution with the result of a reshape.
    """

    axes: tuple[int, ...]
    axis_name: AxisName | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    group_size: int | None = None

    def expand(self, per_channel: jax.Array) -> jax.Array:
        """A per-channel array with the rank of the input."""
        if self.group_size is None:
            return jnp.expand_dims(per_channel, self.axes)
        by_row = jnp.repeat(per_channel, self.group_size, axis=0)
        return jnp.expand_dims(by_row, self.axes[1:])

    def squeeze(self, expanded: jax.Array) -> jax.Array:
        """The inverse of `expand`: the array that `expand` was given."""
        if self.group_size is None:
            return lax.squeeze(expanded, self.axes)
        return lax.squeeze(expanded, self.axes[1:])[:: self.group_size]

    def sum(self, values: jax.Array) -> jax.Array:
        """The sum of the values of each channel."""
        if self.group_size is None:
            return jnp.sum(values, self.axes)
        grouped = values.reshape(-1, self.group_size, *values.shape[1:])
        return jnp.sum(grouped, tuple(axis + 1 for axis in self.axes))

    def expanded_sum(self, values: jax.Array) -> jax.Array:
        """A cotangent for `expand`, whose transpose sums it to the sum of each channel.

        Each row has an equal share of the sum of its group. Sums of the rows themselves
        would give the same result, but cost a GPU a pass over memory
        (docs/library/compiled.md).
        """
        expanded = self.expand(self.sum(values))
        return expanded if self.group_size is None else expanded / self.group_size

    def local_count(self, shape: tuple[int, ...]) -> int:
        """Number of values per channel in the array of this device."""
        rows = shape if self.group_size is None else (self.group_size, *shape[1:])
        return math.prod(rows[axis] for axis in self.axes)

    def on_this_device(self) -> "Reduction":
        """The same reduction over the array's axes only, without the devices."""
        return Reduction(self.axes, group_size=self.group_size)

    def devices(self) -> int:
        """Number of devices that share statistics."""
        return 1 if self.axis_name is None else self._psum(1)

    def total(self, sums: jax.Array) -> jax.Array:
        """The sum over the devices that share statistics."""
        return sums if self.axis_name is None else self._psum(sums)

    def _psum(self, value: Any) -> Any:
        try:
            return lax.psum(
                value, self.axis_name, axis_index_groups=self.axis_index_groups
            )
        except NameError as error:
            raise NameError(
                f"batch_norm: axis_name={self.axis_name!r} is not bound here. Expected "
                "the axis_name of an enclosing jax.pmap, jax.vmap or jax.shard_map. "
                "Under jit with sharded arrays leave axis_name out: the statistics are "
                "those of the global batch without it."
            ) from error
        except NotImplementedError as error:
            raise NotImplementedError(
                f"batch_norm: axis_index_groups={self.axis_index_groups} over "
                f"axis_name={self.axis_name!r} is not supported by JAX in this "
                "context. JAX supports it under jax.pmap and under jax.shard_map(..., "
                "check_vma=False). Elsewhere, split the mesh axis in two and pass the "
                "inner one as axis_name."
            ) from error


def moments_about_origin(
    x: jax.Array,
    mask: jax.Array | None,
    known_origin: jax.Array | None,
    reduction: Reduction,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Moments]:
    """An origin close to the mean, and the moments of x - origin.

    The caller adds the origin to the mean: if abs(mean) / std is 1e6, a float32 mean is
    itself off by several hundredths of a standard deviation.

    The variance is E[(x - origin)^2] - E[x - origin]^2. In float32 its relative error
    is up to 4e-7 * (1 + (mean - origin)^2 / var), so that the origin must be close to
    the mean. The origin depends on the program:

    =============================  ==================  ================================
    program                        origin              error of the variance
    =============================  ==================  ================================
    CPU or GPU, one device         first row of `x`    below 1e-5
    CPU or GPU, with a mask        mean of the batch   below 1e-5, for a second pass
    TPU; arrays that XLA           `known_origin`      4e-7 * (1 + d^2 / var), d being
    partitions; devices that                           its distance from the mean
    share by `axis_name`
    any, without a known origin    mean of the batch   below 1e-5, for a second pass
                                                       and a second collective
    =============================  ==================  ================================

    On a TPU, XLA fuses the sums into the convolution that computes `x`. This is only
    possible if the origin is known before `x` is. A first row would cost one more pass
    over memory per layer (ResNet-50 on a v5e: 127 million cycles instead of 107), and
    devices that share statistics would need a collective to agree on it. On a CPU or a
    GPU a convolution is a library call that fuses nothing, and the first row is free.

    Args:
        x: of any rank and real dtype.
        mask: None, or booleans or weights of the rank of `x`.
        known_origin: an estimate of the mean, such as the running mean, of shape
            (features,) and of `dtype`; equal on all devices that share. None to have
            the exact moments everywhere, whatever the cost.
        reduction: the axes and devices to take the moments over.
        dtype: of the computation and the results: float32 or float64.

    Returns:
        The origin and the Moments, of shape (features,), equal on all devices that
        share them.
    """
    origin, mean, var, count = _local_moments(
        x, mask, known_origin, reduction=reduction.on_this_device(), dtype=dtype
    )
    local = Moments(mean, var, count)
    if reduction.axis_name is None:
        return origin, local
    # If JAX tracks over which mesh axes a value varies (shard_map with its checks), it
    # knows whether all devices have the same origin.
    tracked = varying_axes(x) & set(axis_names(reduction.axis_name))
    if known_origin is None or varying_axes(known_origin) & tracked:
        # The local sums do not wait for this collective; only the merge does.
        offers = (count > 0).astype(dtype)
        total, number = reduction.total(jnp.stack([offers * origin, offers]))
        common = round_once(total / jnp.maximum(number, 1))
        about = Moments(mean + (origin - common), var, count)
        return common, _merge_about_zero(about, reduction.total)
    about = Moments(mean + (origin - known_origin), var, count)
    fixed_count = None if mask is not None else reduction.local_count(x.shape)
    return known_origin, _merge_shared(
        about, reduction, fixed_count, None if tracked else known_origin
    )


def _merge_shared(
    local: Moments,
    reduction: Reduction,
    fixed_count: int | None,
    origin: jax.Array | None,
) -> Moments:
    """Merge the devices' moments about one origin, in one collective.

    Args:
        local: moments of each device.
        reduction: over the devices.
        fixed_count: values per channel on each device, if it is the same on all.
        origin: to check that it is the same on all devices; None if that is known.
    """
    rows = [*_power_sums(local)]
    rows += [local.count] if fixed_count is None else []
    rows += [] if origin is None else [origin]
    first, second, *rest = reduction.total(jnp.stack(rows))
    devices = reduction.devices()
    if fixed_count is None:
        count = rest.pop(0)
    else:
        count = jnp.full_like(first, devices * fixed_count)
    joined = _from_sums(count, first, second, _least_digit(first.dtype))
    if origin is None:
        return joined
    # Sums about different origins cannot be merged: a NaN is better than a wrong mean.
    wanted = devices * origin
    tolerance = devices * jnp.finfo(origin.dtype).eps * jnp.abs(wanted)
    equal = jnp.abs(rest[0] - wanted) <= tolerance
    mean = lax.select(equal, joined.mean, jnp.full_like(joined.mean, jnp.nan))
    return Moments(mean, joined.var, joined.count)


def _merge_about_zero(
    parts: Moments, total: Callable[[jax.Array], jax.Array]
) -> Moments:
    """Merge moments whose means are small compared with their spread.

    `total` sums, over the parts, an array that stacks three sums. If the means are
    taken about an origin close to all of them, sum(n * (var + mean**2)) / n - mean**2
    does not cancel.
    """
    first, second = _power_sums(parts)
    count, first, second = total(jnp.stack([parts.count, first, second]))
    return _from_sums(count, first, second)


def _power_sums(moments: Moments) -> tuple[jax.Array, jax.Array]:
    """The sum of the values and the sum of their squares."""
    second = moments.var + jnp.square(moments.mean)
    return moments.count * moments.mean, moments.count * second


def _from_sums(
    count: jax.Array, first: jax.Array, second: jax.Array, least_digit: float = 0.0
) -> Moments:
    """Moments from the sums of weights, values and squares.

    The difference of squares has no digits left below `least_digit` * mean^2. A
    variance that was lost to rounding is set to this bound and not to zero: training
    goes on if an output is too small for a while, but not if it is a thousand times too
    large.
    """
    divisor = safe_count(count)
    mean = first / divisor
    square = jnp.square(mean)
    var = jnp.maximum(second / divisor - square, least_digit * square)
    return Moments(mean, var, count)


def _least_digit(dtype) -> float:
    """The smallest relative part of a square that still changes it when added."""
    return float(jnp.finfo(dtype).eps)


def safe_count(count: jax.Array) -> jax.Array:
    """A count that is safe to divide by: 1 where nothing was counted."""
    return lax.select(count > 0, count, jnp.ones_like(count))


def mask_to_bool(mask: jax.Array) -> jax.Array:
    """Where a mask of booleans or weights lets a value count."""
    return mask if mask.dtype == bool else mask > 0


def round_once(value: jax.Array) -> jax.Array:
    """Round to three binary digits fewer, so that a quotient is one number everywhere.

    XLA recomputes a quotient in each fusion that uses it, inside fused multiply-adds
    that do not round it: two uses see two numbers, which differ by abs(mean) * 2^-24. A
    number that is explicitly rounded to fewer digits is the same in every fusion.
    """
    finfo = jnp.finfo(value.dtype)
    return lax.reduce_precision(value, finfo.nexp, finfo.nmant - 3)


def sum_terms(
    terms: Callable[..., Sequence[jax.Array]],
    rows: Sequence[jax.Array | None],
    channels: Sequence[jax.Array | None],
    reduction: Reduction,
) -> list[jax.Array]:
    """Sum over a batch the terms of an elementwise function of arrays and channels."""
    return [reduction.sum(term) for term in terms(*rows, *channels)]


def _moments_reference(x, mask, known_origin, *, reduction, dtype):
    """Origin, mean, var and count about `known_origin`, else about the batch's mean."""
    if known_origin is not None:
        least = _least_digit(dtype)
        return _moments_about(x, mask, known_origin, reduction, dtype, least)
    count, total, _ = _sums_about(x, mask, None, reduction, dtype)
    mean = round_once(total / safe_count(count))
    return _moments_about(x, mask, mean, reduction, dtype)


def _moments_on_one_device(
    x, mask, _, *, reduction, dtype, cut=lambda x, part: part(x), sums=sum_terms
):
    """The same about the first row, which is in memory because the sums do not fuse."""
    if mask is not None:
        return _moments_reference(x, mask, None, reduction=reduction, dtype=dtype)
    axes, strides = reduction.axes, None
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    if reduction.group_size is not None:
        axes, strides = axes[1:], [reduction.group_size] + [1] * (x.ndim - 1)
        sizes[0] = x.shape[0]
    first_row = cut(x, lambda x: lax.slice(x, [0] * x.ndim, sizes, strides))
    # A copy: a row that is read from `x` again would keep `x` from being replaced.
    first_row = lax.optimization_barrier(lax.squeeze(first_row, axes).astype(dtype))
    return _moments_about(x, None, first_row, reduction, dtype, sums=sums)


def _moments_on_cpu(x, mask, _, *, reduction, dtype):
    if reduction.group_size is not None:
        return _moments_on_one_device(x, mask, None, reduction=reduction, dtype=dtype)
    if _cpu.kernel_supports(x, reduction.axes, dtype, mask=mask):
        origin, mean, var = _cpu.moments(x, reduction.axes)
        count = jnp.full_like(origin, reduction.local_count(x.shape))
        return [origin, mean, var, count]
    return _moments_on_one_device(
        x,
        mask,
        None,
        reduction=reduction,
        dtype=dtype,
        cut=blocks.cut_of,
        sums=sum_in_blocks,
    )


def sum_in_blocks(terms, rows, channels, reduction):
    """`sum_terms` for a CPU; without groups."""
    return blocks.sum_in_blocks(terms, rows, channels, reduction.axes)


_local_moments = operation(
    "batch_norm_moments",
    _moments_reference,
    cpu=OneDevice(_moments_on_cpu, exported=_moments_on_one_device),
    gpu=OneDevice(_moments_on_one_device, exported=_moments_on_one_device),
)


def _moments_about(x, mask, origin, reduction, dtype, least_digit=0.0, sums=sum_terms):
    origin = lax.stop_gradient(origin)
    found = _sums_about(x, mask, origin, reduction, dtype, sums)
    moments = _from_sums(*found, least_digit)
    # The origin must vary over the same mesh axes as the moments, whichever it is.
    origin = origin + jnp.zeros_like(moments.count)
    return [origin, moments.mean, moments.var, moments.count]


def _sums_about(x, mask, origin, reduction, dtype, sums=sum_terms):
    """The sums of the weights w, of w * (x - origin) and of w * (x - origin)^2."""

    def powers(x, origin):
        distance = x.astype(dtype)
        if origin is not None:
            distance = distance - origin
        return distance, jnp.square(distance)

    def weighted_powers(x, origin):
        # A masked value may be NaN, or overflow when squared.
        distance = jnp.where(counted, powers(x, origin)[0], 0)
        return weights * distance, weights * jnp.square(distance)

    origin = None if origin is None else reduction.expand(origin)
    count = reduction.local_count(x.shape)
    if mask is None:
        first, second = sums(powers, [x], [origin], reduction)
        return jnp.full_like(first, count), first, second
    counted = mask_to_bool(mask)
    weights = jnp.where(counted, mask, jnp.zeros_like(mask)).astype(dtype)
    first, second = sums(weighted_powers, [x], [origin], reduction)
    repeats = count // reduction.local_count(mask.shape)
    return reduction.sum(weights) * repeats + jnp.zeros_like(first), first, second


def complex_moments(
    x: jax.Array, mask: jax.Array | None, reduction: Reduction
) -> Moments:
    """The complex mean and the real variance of abs(x - mean), in two passes."""
    dtype = jnp.promote_types(x.dtype, jnp.complex64)
    count, total, _ = _sums_about(x, mask, None, reduction, dtype)
    count, total = reduction.total(jnp.stack([count, total]))
    count = count.real
    mean = total / safe_count(count).astype(dtype)
    distance = jnp.abs(x.astype(dtype) - reduction.expand(mean))
    _, var, _ = _sums_about(jnp.square(distance), mask, None, reduction, count.dtype)
    return Moments(mean, reduction.total(var) / safe_count(count), count)


def checkpoint_named(statistics: Any) -> Any:
    """The same arrays, under the name by which a remat policy can save them."""
    return jax.tree.map(lambda a: checkpoint_name(a, CHECKPOINT_NAME), statistics)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes of an enclosing shard_map over which a value is known to vary."""
    return jax.typeof(x).manual_axis_type.varying


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """One axis name or several, as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, tuple) else (axis_name,)
