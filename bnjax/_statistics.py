"""Mean, variance and count of a batch, and the one rule that joins them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, auto_axes

from bnjax import _cpu
from bnjax._operation import operation
from bnjax._sums import batch_sums, cut_of

AxisName = str | tuple[str, ...]

# A remat policy that saves this name repeats neither the sums nor the collectives.
CHECKPOINT_NAME = "batch_stats"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchStats:
    """Running mean and variance of a batch-normalized layer.

    Attributes:
        mean: running mean, float32 (float64 for float64 input), shape (features,).
        var: running variance, same dtype and shape.

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
        """Statistics of a layer that has seen nothing: mean 0, variance 1.

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
    """Mean, biased variance and count of one batch, shard, micro-batch or group.

    Attributes:
        mean: sum(w * x) / count, float32 or float64, shape (features,).
        var: sum(w * (x - mean)**2) / count, same dtype and shape.
        count: sum(w), the number of values in each channel, same dtype and shape.

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
        """Moments of all the values that these moments describe together.

        With n = sum(n_i): mean = sum(n_i * mean_i) / n and
        var = sum(n_i * (var_i + (mean_i - mean)**2)) / n. Nothing cancels where the
        means are large beside their differences; parts of count 0 change nothing.

        Args:
            *others: moments of other values, arrays of the same shape and dtype.

        Returns:
            The joined Moments.

        References:
            Chan, Golub & LeVeque (1983), "Algorithms for computing the sample
            variance: analysis and recommendations".
        """
        parts = (self, *others)
        origin = jnp.zeros_like(self.mean)
        for part in parts:
            origin = jnp.where(part.count > 0, part.mean, origin)
        centred = [Moments(p.mean - origin, p.var, p.count) for p in parts]
        joined = merge_about_zero(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *centred),
            lambda sums: jnp.sum(sums, axis=1),
        )
        return Moments(origin + joined.mean, joined.var, joined.count)


def merge_about_zero(
    parts: Moments, total: Callable[[jax.Array], jax.Array]
) -> Moments:
    """Join moments whose means are small beside their spread.

    `total` adds up, over the parts, an array that stacks three sums. Where the means
    are taken about an origin close to all of them,
    sum(n * (var + mean**2)) / n - mean**2 does not cancel.
    """
    first = parts.count * parts.mean
    second = parts.count * (parts.var + jnp.square(parts.mean))
    return _from_sums(*total(jnp.stack([parts.count, first, second])))


def _from_sums(count, first, second) -> Moments:
    divisor = positive(count)
    mean = first / divisor
    var = jnp.maximum(second / divisor - jnp.square(mean), 0)
    return Moments(mean, var, count)


def positive(count: jax.Array) -> jax.Array:
    """A count to divide by: 1 where nothing was counted."""
    return lax.select(count > 0, count, jnp.ones_like(count))


@dataclass(frozen=True)
class Reduction:
    """Which values share statistics: axes of the array, and devices."""

    axes: tuple[int, ...]
    axis_name: AxisName | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None

    def expand(self, per_channel: jax.Array) -> jax.Array:
        """A per-channel array with the rank of the input."""
        return jnp.expand_dims(per_channel, self.axes)

    def local_count(self, shape: tuple[int, ...]) -> int:
        """Values per channel in this device's array."""
        return math.prod(shape[axis] for axis in self.axes)

    def devices(self) -> int:
        """How many devices share statistics."""
        if self.axis_name is None:
            return 1
        return self._collective(1)

    def total(self, sums: jax.Array) -> jax.Array:
        """Sum over the devices that share statistics."""
        return sums if self.axis_name is None else self._collective(sums)

    def _collective(self, value):
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
                "context. It is under jax.pmap and under jax.shard_map(..., "
                "check_vma=False). Elsewhere, split the mesh axis in two and name "
                "the inner one."
            ) from error


def moments_about_origin(
    x: jax.Array, mask: jax.Array | None, reduction: Reduction, dtype: jnp.dtype
) -> tuple[jax.Array, Moments]:
    """One pass over `x`: an origin close to the mean, and the moments of x - origin.

    Both leave their float32 sum to the caller: where |mean| / std is 1e6, a float32
    mean is itself off by several hundredths of a standard deviation.

    Args:
        x: of any rank and dtype.
        mask: None, or booleans or weights of the rank of `x`.
        reduction: the axes and devices to take the moments over.
        dtype: of the computation and the results: float32 or float64.

    Returns:
        The origin and the Moments, of shape (features,), equal on every device that
        shares them.
    """
    count = reduction.local_count(x.shape)
    if mask is None:
        origin, mean, var = _local_moments(x, axes=reduction.axes, dtype=dtype)
        local = Moments(mean, var, jnp.full_like(origin, count))
    else:
        x = x.astype(dtype)
        seen = live(mask)
        thin = tuple(axis for axis in reduction.axes if mask.shape[axis] == 1)
        candidates = jnp.where(seen, _first(x, thin), 0)
        found = jnp.broadcast_to(seen, candidates.shape).astype(x.dtype)
        origin = lax.stop_gradient(
            _mean_of_live(
                jnp.sum(candidates, reduction.axes), jnp.sum(found, reduction.axes)
            )
        )
        distance = jnp.where(seen, x - reduction.expand(origin), 0)
        weights = jnp.where(seen, mask, jnp.zeros_like(mask)).astype(x.dtype)
        repeats = count / reduction.local_count(mask.shape)
        weight = jnp.sum(weights, reduction.axes) * repeats + jnp.zeros_like(origin)
        weighted = weights * distance
        first = jnp.sum(weighted, reduction.axes)
        second = jnp.sum(weighted * distance, reduction.axes)
        local = _from_sums(weight, first, second)
    if reduction.axis_name is None:
        return origin, local
    # The local sums do not wait for this collective; only the joining does.
    offers = (local.count > 0).astype(dtype)
    shared = _mean_of_live(*reduction.total(jnp.stack([offers * origin, offers])))
    about_shared = Moments(local.mean + (origin - shared), local.var, local.count)
    return shared, merge_about_zero(about_shared, reduction.total)


def _about_first_row(x, *, axes, dtype):
    """The first row, and the mean and variance of the distance from it."""
    # A copy of its own: read from `x` again, it would keep `x` from being replaced.
    first_row = lax.optimization_barrier(
        lax.stop_gradient(_first(x, axes).astype(dtype))
    )
    origin = lax.squeeze(first_row, axes)
    count = jnp.full_like(origin, Reduction(axes).local_count(x.shape))

    def powers(x, origin):
        distance = x.astype(dtype) - origin
        return distance, jnp.square(distance)

    moments = _from_sums(count, *batch_sums(powers, [x], [first_row], axes))
    return [origin, moments.mean, moments.var]


def _about_first_row_on_cpu(x, *, axes, dtype):
    if _cpu.kernel_supports(x, axes, dtype):
        return _cpu.moments(x, axes)
    return _about_first_row(x, axes=axes, dtype=dtype)


_local_moments = operation(
    "batch_moments", _about_first_row, on_cpu=_about_first_row_on_cpu
)


def live(mask: jax.Array) -> jax.Array:
    """Where a mask of booleans or weights lets a value count."""
    return mask if mask.dtype == bool else mask > 0


def _mean_of_live(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, 1)


def named(statistics):
    """The same arrays under the name by which a remat policy can save them."""
    return jax.tree.map(lambda a: checkpoint_name(a, CHECKPOINT_NAME), statistics)


def _first(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The first entry along `axes`, which stay with length 1."""
    limits = [1 if axis in axes else size for axis, size in enumerate(x.shape)]

    def cut(x):
        return lax.slice(x, [0] * x.ndim, limits)

    spec = jax.typeof(x).sharding.spec
    spec = [*spec, *[None] * (x.ndim - len(spec))]
    if all(spec[axis] is None for axis in axes):
        return cut_of(x, cut)
    # An explicitly sharded dimension refuses to be cut to a length of one.
    kept = [None if axis in axes else name for axis, name in enumerate(spec)]
    cut_anywhere: Callable = auto_axes(cut, out_sharding=PartitionSpec(*kept))
    return cut_of(x, cut_anywhere)
