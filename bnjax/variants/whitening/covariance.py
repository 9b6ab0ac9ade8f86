"""Mean and covariances of a batch in groups of channels, and their running averages."""

import dataclasses
import functools
import string

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax import _validate, functional
from bnjax._moments import (
    Reduction,
    axis_names,
    checkpoint_named,
    mask_to_bool,
    round_once,
    safe_count,
    varying_axes,
)
from bnjax.functional import BatchStats, Moments
from bnjax.variants.whitening.inverse_sqrt import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WhiteningStats:
    """Running mean and covariances of a whitened layer.

    The covariance is kept, and not the whitening matrix, because the inverse square
    root of a mean is not the mean of inverse square roots. The latter is larger, the
    more so the smaller the batch. The mean of covariances is unbiased for any batch.
    With one channel per group, the covariance is the running variance of batch
    normalization.

    Attributes:
        mean: running mean, float32 (float64 for float64 input), shape (features,).
        cov: running covariances, of the same dtype, shape (groups, group_size,
            group_size).
    """

    mean: jax.Array
    cov: jax.Array

    @classmethod
    def init(
        cls, features: int, group_size: int | None, dtype=jnp.float32
    ) -> "WhiteningStats":
        """Initial statistics, before the first update: mean 0, covariance I.

        Args:
            features: number of channels.
            group_size: number of channels in a group, a divisor of `features`; None for
                all.
            dtype: float32, or float64 for float64 inputs.

        Returns:
            The WhiteningStats.

        Raises:
            ValueError: if the group size does not divide the number of features.

        Examples:
            >>> from bnjax.variants.whitening import WhiteningStats
            >>> WhiteningStats.init(6, group_size=2).cov.shape
            (3, 2, 2)
        """
        groups = ChannelGroups.of((features,), 0, group_size)
        shape = (groups.number, groups.size, groups.size)
        eye = jnp.broadcast_to(jnp.eye(groups.size, dtype=dtype), shape)
        return cls(jnp.zeros(features, dtype), eye)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WhiteningMoments:
    r"""Mean, biased covariances and count of one batch.

    Attributes:
        mean: $\sum_i w_i x_i / n$, float32 or float64, shape (features,).
        cov: $\sum_i w_i (x_i - \mu)(x_i - \mu)^T / n$ over the channels of each group,
            of the same dtype, shape (groups, group_size, group_size).
        count: $n = \sum_i w_i$, the number of values of each channel, of the same
            dtype, shape ().
    """

    mean: jax.Array
    cov: jax.Array
    count: jax.Array


def update_whitening_stats(
    batch_stats: WhiteningStats,
    batch: WhiteningMoments,
    *,
    momentum: float | jax.Array = 0.99,
    unbiased: bool = True,
) -> WhiteningStats:
    r"""Move running statistics towards those of a batch.

    $$
    \mu \leftarrow \rho \mu + (1 - \rho) \mu_B, \quad
    \Sigma \leftarrow \rho \Sigma + (1 - \rho) \frac{m}{m - 1} \Sigma_B
    $$

    with `momentum` $\rho$ and $m$ = batch.count. The factor $m / (m - 1)$ is there only
    with `unbiased`. This is `bnjax.update_batch_stats` for each pair of channels. If
    $m \le 1$, the old statistics stay unchanged.

    Args:
        batch_stats: the old statistics.
        batch: WhiteningMoments of all the values of this update.
        momentum: weight of the old statistics, in [0, 1].
        unbiased: False keeps the biased covariance, as Flax's layers do.

    Returns:
        The new WhiteningStats, float64 if either argument is, else float32.

    Raises:
        ValueError: if the momentum is out of range or the shapes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.whitening import (
        ...     WhiteningStats,
        ...     update_whitening_stats,
        ...     whiten_batch,
        ... )
        >>> x = jnp.array([[1.0, 1.0], [3.0, 7.0]])
        >>> _, batch = whiten_batch(x, group_size=2)
        >>> old = WhiteningStats.init(2, group_size=2)
        >>> new = update_whitening_stats(old, batch, momentum=0.5)
        >>> print(new.mean, new.cov.round(2))
        [1. 2.] [[[1.5 3. ]
          [3.  9.5]]]
    """
    shapes = {(jnp.shape(s.mean), jnp.shape(s.cov)) for s in (batch_stats, batch)}
    if len(shapes) > 1:
        raise ValueError(
            f"update_whitening_stats: shapes (mean, cov) {sorted(shapes)} differ; "
            "expected (features,) and (groups, group_size, group_size), for both."
        )

    def of_pairs(mean):
        mean = jnp.reshape(mean, (*batch.cov.shape[:2], 1))
        return jnp.broadcast_to(mean, batch.cov.shape)

    new = functional.update_batch_stats(
        BatchStats(of_pairs(batch_stats.mean), batch_stats.cov),
        Moments(
            of_pairs(batch.mean),
            batch.cov,
            jnp.broadcast_to(batch.count, batch.cov.shape),
        ),
        momentum=momentum,
        unbiased=unbiased,
    )
    return WhiteningStats(new.mean[..., 0].reshape(batch.mean.shape), new.var)


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """Groups of consecutive channels of an array, split into axes of their own.

    Attributes:
        ndim: rank of the array.
        axis: the feature axis.
        number: number of groups.
        size: number of channels in a group.
    """

    ndim: int
    axis: int
    number: int
    size: int

    @classmethod
    def of(
        cls, shape: tuple[int, ...], axis: int, group_size: int | None
    ) -> "ChannelGroups":
        """The groups of an array of a shape, or an error if it cannot be split."""
        (feature, *others), _ = _validate.split_axes(shape, axis)
        if others:
            raise ValueError(
                f"batch_norm: axis={axis!r}; expected one feature axis, whose channels "
                "are whitened in groups."
            )
        channels = shape[feature]
        size = channels if group_size is None else group_size
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"batch_norm: group_size={size!r}; expected an int or None."
            )
        if size < 1 or channels % size:
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(
                f"batch_norm: group_size={size} for {channels} features; expected a "
                f"divisor: {', '.join(map(str, divisors))}."
            )
        return cls(len(shape), feature, channels // size, size)

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of a split array that the statistics are over."""
        own = (self.axis, self.axis + 1)
        return tuple(a for a in range(self.ndim + 1) if a not in own)

    def split(self, array: jax.Array) -> jax.Array:
        """The array with (number, size) in place of the feature axis."""
        before, after = array.shape[: self.axis], array.shape[self.axis + 1 :]
        # A mask has size 1 along the feature axis.
        alike = array.shape[self.axis] == 1
        own = (1, 1) if alike else (self.number, self.size)
        return jnp.reshape(array, (*before, *own, *after))

    def join(self, array: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        before, after = array.shape[: self.axis], array.shape[self.axis + 2 :]
        return jnp.reshape(array, (*before, self.number * self.size, *after))

    def grouped(self, per_channel: jax.Array) -> jax.Array:
        """A per-channel array in shape (number, size)."""
        return jnp.reshape(per_channel, (self.number, self.size))

    def subscripts(self, channel: str) -> str:
        """A split array as einsum names it, g being the group."""
        letters = string.ascii_uppercase[: self.ndim - 1]
        return f"{letters[: self.axis]}g{channel}{letters[self.axis :]}"


def batch_moments(
    x: jax.Array,
    mask: jax.Array | None,
    origin: jax.Array | None,
    groups: ChannelGroups,
    reduction: Reduction,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, WhiteningMoments]:
    """Mean and covariances of a batch, in a form that keeps the digits of x - mean.

    Each device takes its sums about the mean of its own values. If devices share
    statistics, the sums are then moved to a common origin and added up in one
    collective. If the mean is at a distance d from that origin, the error of the
    covariance is 1e-7 * d^2.

    Args:
        x: of real dtype.
        mask: of size 1 along the feature axis, or None.
        origin: equal on all devices, shape (features,); None to agree on an origin
            first.
        groups: of channels.
        reduction: over axes of the split array, and devices.
        dtype: of the computation.

    Returns:
        A center close to the mean, which differs between devices; the mean minus the
        center, both of shape (groups, size); and the moments.
    """
    values, weights, axis = x, mask, groups.axis
    if x.ndim == 1:
        # One example a device: an axis of size 1 for the local mean.
        values, weights, axis = x[None], None if mask is None else mask[None], 1
    found = functional.moments(values, axis=axis, mask=weights)
    count = jnp.max(found.count).astype(dtype)
    center = lax.stop_gradient(groups.grouped(found.mean.astype(dtype)))
    first, second = _sums(x, mask, center, groups, reduction, dtype)
    divisor = safe_count(count)
    mean = first / divisor
    cov = second / divisor - _outer(mean)
    shift = jnp.zeros_like(mean)
    if reduction.axis_name is not None:
        origin = _common_origin(origin, center, count, groups, reduction)
        shift = center - origin
        mean, cov, count = _shared(mean + shift, cov, count, origin, reduction)
    else:
        origin = center
    cov = (cov + cov.mT) / 2
    mean, cov, count = checkpoint_named((mean, cov, count))
    channels = (groups.number * groups.size,)
    moments = WhiteningMoments(jnp.reshape(origin + mean, channels), cov, count)
    return center, mean - shift, moments


def _sums(x, mask, center, groups, reduction, dtype):
    """The sums of w * (x - center) and of w * (x - center) (x - center)^T."""
    subscripts = f"{groups.subscripts('i')},{groups.subscripts('j')}->gij"
    sharding = _sharding_of_groups(x, groups.axis)

    # Recomputed from `x` in the derivative, and not from a float32 copy of it.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def sums(x, center):
        distance = groups.split(x).astype(dtype) - reduction.expand(center)
        weighted = distance
        if mask is not None:
            counted = mask_to_bool(groups.split(mask))
            distance = jnp.where(counted, distance, 0)
            weighted = distance * groups.split(mask).astype(dtype)
        second = einsum(subscripts, weighted, distance, out_sharding=sharding)
        return jnp.sum(weighted, reduction.axes), second

    return sums(x, center)


def _sharding_of_groups(x: jax.Array, axis: int) -> NamedSharding | None:
    """The sharding of the covariances of an array on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, P(sharding.spec[axis], None, None))


def _common_origin(origin, center, count, groups, reduction):
    names = axis_names(reduction.axis_name)
    if origin is not None and varying_axes(origin).isdisjoint(names):
        # A running mean that is not finite must not make every later output NaN.
        origin = jnp.where(jnp.isfinite(origin), origin, 0).astype(center.dtype)
        return lax.stop_gradient(groups.grouped(origin))
    weights = jnp.broadcast_to(count, center.shape)
    total, number = reduction.total(jnp.stack([count * center, weights]))
    return round_once(total / safe_count(number))


def _shared(mean, cov, count, origin, reduction):
    """Merge the moments of all devices about one origin, in one collective."""
    columns = [
        count * (cov + _outer(mean)),
        (count * mean)[..., None],
        jnp.broadcast_to(count, (*mean.shape, 1)),
        origin[..., None],
    ]
    total = reduction.total(jnp.concatenate(columns, axis=-1))
    size = mean.shape[-1]
    second, first, counts, origins = jnp.split(
        total, (size, size + 1, size + 2), axis=-1
    )
    count = jnp.max(counts)
    mean, second = first[..., 0] / safe_count(count), second / safe_count(count)
    # The difference has no digits below these. If the covariance is too large, the
    # output is only too small for a while.
    digits = jnp.finfo(mean.dtype).eps * jnp.sum(jnp.square(mean), -1)
    eye = jnp.eye(size, dtype=mean.dtype)
    cov = second - _outer(mean) + lax.stop_gradient(digits)[..., None, None] * eye
    # Sums about different origins cannot be merged: a NaN is better than a wrong mean.
    wanted = reduction.devices() * origin
    near = jnp.finfo(mean.dtype).eps * reduction.devices() * jnp.abs(wanted)
    equal = jnp.abs(origins[..., 0] - wanted) <= near
    return jnp.where(equal, mean, jnp.nan), cov, count


def _outer(mean):
    return mean[..., :, None] * mean[..., None, :]
