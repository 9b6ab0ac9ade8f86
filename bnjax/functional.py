"""Batch normalization as pure functions: statistics go in, new statistics come out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks
from bnjax._arguments import check_count, prepare
from bnjax._checks import Activation, Axes
from bnjax._gradient import normalize_by, normalize_by_batch
from bnjax._statistics import (
    CHECKPOINT_NAME,
    AxisName,
    BatchStats,
    Moments,
    moments_about_origin,
    named,
)

__all__ = [
    "CHECKPOINT_NAME",
    "BatchStats",
    "Moments",
    "batch_norm",
    "moments",
    "normalize",
    "update_batch_stats",
]

AxisIndexGroups = Sequence[Sequence[int]]


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: BatchStats,
    *,
    use_running_average: bool = False,
    axis: Axes = -1,
    momentum: float | jax.Array = 0.99,
    epsilon: float | jax.Array = 1e-5,
    unbiased: bool = True,
    update_stats: bool = True,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype=None,
) -> tuple[jax.Array, BatchStats]:
    """Batch normalization, in training or in inference.

    y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual), with the
    mean and the biased variance of the batch in training, and the running ones where
    `use_running_average`. In training the new statistics are
    momentum * old + (1 - momentum) * batch, the variance times m / (m - 1) where
    `unbiased`, m being the number of values per channel on all devices that share.

    Args:
        x: input, of any shape of rank 2 or more; float16, bfloat16, float32 or float64.
        scale: gamma, shape (features,); None for ones.
        bias: beta, shape (features,); None for zeros.
        batch_stats: running statistics, float32 (float64 for float64 input), shape
            (features,).
        use_running_average: normalize by `batch_stats` and leave them as they are.
        axis: the feature axis or axes of `x`; the statistics are over the others.
        momentum: weight of the old statistics, in [0, 1]. PyTorch's momentum is the
            weight of the new ones: its 0.1 is 0.9 here.
        epsilon: added to the variance; positive.
        unbiased: the paper's and PyTorch's running variance; False gives Flax's.
        update_stats: False returns `batch_stats` as they are.
        mask: which values count, of the rank of `x`, each dimension 1 or that of `x`:
            booleans, or weights that count as repeats. All values are normalized; those
            hidden change no statistics, even if NaN. Not differentiated. Where the
            weights add up to 1 or less, the running statistics stay as they are.
        axis_name: axis or axes of an enclosing pmap, vmap or shard_map whose devices
            share statistics. Not for jit with sharded arrays, where the statistics are
            those of the global batch without it.
        axis_index_groups: groups of indices of that axis that share statistics.
        activation: a name of jax.nn, such as "relu", or an elementwise function. It is
            applied in float32 (float64 for float64 input), and its derivative computed
            again from `x`.
        residual: added before the activation; shape of `x`.
        dtype: of the output; that of `x` if None. Sums are float32 or float64 always.

    Returns:
        The output, of the shape of `x`, and the new BatchStats.

    Raises:
        TypeError: for integer or complex arrays, or a traced flag.
        ValueError: for shapes that do not fit, one value per channel in training, an
            unknown activation, momentum or epsilon out of range.
        NameError: for an `axis_name` that is not bound.
        NotImplementedError: for `axis_index_groups` where JAX has none.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> x = jnp.array([[1.0, -4.0], [3.0, 4.0]])
        >>> y, stats = bnjax.batch_norm(
        ...     x, jnp.ones(2), jnp.zeros(2), bnjax.BatchStats.init(2), momentum=0.9
        ... )
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(stats.mean, stats.var)
        [0.2 0. ] [1.1 4.1]
        >>> y, _ = bnjax.batch_norm(x, None, None, stats, use_running_average=True)
        >>> print(y.round(2))
        [[ 0.76 -1.98]
         [ 2.67  1.98]]

    References:
        Ioffe & Szegedy (2015), Algorithms 1 and 2, sections 3.1 and 3.2.
    """
    for value, name in (
        (use_running_average, "use_running_average"),
        (update_stats, "update_stats"),
        (unbiased, "unbiased"),
    ):
        _checks.check_flag(value, name)
    _checks.check_momentum(momentum)
    transform, operands = prepare(
        x,
        scale,
        bias,
        batch_stats.mean,
        batch_stats.var,
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    if use_running_average:
        mean, var = jnp.asarray(batch_stats.mean), jnp.asarray(batch_stats.var)
        return normalize_by(transform, operands, mean, var), batch_stats
    check_count(operands.x, transform.reduction)
    y, origin, centred = normalize_by_batch(transform, operands)
    if not update_stats:
        return y, batch_stats
    batch = Moments(origin + centred.mean, centred.var, centred.count)
    return y, update_batch_stats(
        batch_stats, batch, momentum=momentum, unbiased=unbiased
    )


def moments(
    x: jax.Array,
    *,
    axis: Axes = -1,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    """Mean, biased variance and count of a batch, exact at any ratio of mean to spread.

    mean = sum(w * x) / sum(w), var = sum(w * (x - mean)**2) / sum(w), count = sum(w),
    in one pass over `x` about a value close to the mean.

    Args:
        x: input, of any shape of rank 2 or more; float16, bfloat16, float32 or float64.
        axis: the feature axis or axes of `x`; the statistics are over the others.
        mask: which values count, as in `batch_norm`.
        axis_name: axis or axes whose devices share statistics, as in `batch_norm`.
        axis_index_groups: groups of that axis, as in `batch_norm`.

    Returns:
        Moments of float32 (float64 for float64 input), of shape (features,); those of
        nothing at all are mean 0, variance 0, count 0.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> found = bnjax.moments(jnp.array([[1.0], [2.0], [6.0]]) + 1e6)
        >>> print(found.mean, found.var, found.count)
        [1.000003e+06] [4.666667] [3.]

    References:
        Ioffe & Szegedy (2015), Algorithm 1; Chan, Golub & LeVeque (1983).
    """
    transform, operands = prepare(
        x,
        axis=axis,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    origin, centred = named(
        moments_about_origin(
            operands.x, operands.mask, transform.reduction, transform.compute_dtype
        )
    )
    return Moments(origin + centred.mean, centred.var, centred.count)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype=None,
) -> jax.Array:
    """Normalize by given statistics: one affine map of each channel.

    y = activation((x - mean) * (scale / sqrt(var + epsilon)) + bias + residual).

    Args:
        x: input, of any shape of rank 2 or more; float16, bfloat16, float32 or float64.
        mean: shape (features,).
        var: biased or unbiased variance, shape (features,).
        scale: gamma, shape (features,); None for ones.
        bias: beta, shape (features,); None for zeros.
        axis: the feature axis or axes of `x`.
        epsilon: added to the variance; positive.
        mask: as in `batch_norm`; what it hides adds no NaN to gradients.
        activation: as in `batch_norm`.
        residual: added before the activation; shape of `x`.
        dtype: of the output; that of `x` if None.

    Returns:
        The output, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> x = jnp.array([[1.0, -4.0], [3.0, 4.0]])
        >>> y = bnjax.normalize(x, jnp.array([1.0, 0.0]), jnp.array([4.0, 16.0]))
        >>> print(y.round(2))
        [[ 0. -1.]
         [ 1.  1.]]

    References:
        Ioffe & Szegedy (2015), Algorithm 2, line 11.
    """
    transform, operands = prepare(
        x,
        scale,
        bias,
        mean,
        var,
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    return normalize_by(transform, operands, jnp.asarray(mean), jnp.asarray(var))


def update_batch_stats(
    batch_stats: BatchStats,
    batch: Moments,
    *,
    momentum: float | jax.Array = 0.99,
    unbiased: bool = True,
) -> BatchStats:
    """Move running statistics towards those of a batch.

    mean <- momentum * mean + (1 - momentum) * batch.mean, and var likewise with
    batch.var * m / (m - 1) where `unbiased`, m = batch.count. Where m <= 1 the old
    statistics stay, because one value has no spread.

    Args:
        batch_stats: the old statistics, of shape (features,).
        batch: Moments of all the values the statistics are to learn from.
        momentum: weight of the old statistics, in [0, 1].
        unbiased: the paper's and PyTorch's variance; False gives Flax's.

    Returns:
        The new BatchStats, float64 if either argument is, else float32.

    Raises:
        ValueError: for a momentum out of range or shapes that differ.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> batch = bnjax.moments(jnp.array([[1.0], [3.0]]))
        >>> new = bnjax.update_batch_stats(
        ...     bnjax.BatchStats.init(1), batch, momentum=0.5
        ... )
        >>> print(new.mean, new.var)
        [1.] [1.5]

    References:
        Ioffe & Szegedy (2015), section 3.1 and Algorithm 2, line 10.
    """
    _checks.check_momentum(momentum)
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves((batch_stats, batch))}
    if len(shapes) > 1:
        raise ValueError(
            f"update_batch_stats: shapes {sorted(shapes)} differ; expected (features,) "
            "for the mean and variance of both, and for the count."
        )
    var = batch.var
    if unbiased:
        var = var * (batch.count / jnp.maximum(batch.count - 1, 1))
    enough = batch.count > 1

    def moved(old, new):
        old = jnp.asarray(old)
        dtype = _checks.promoted(old.dtype, new.dtype)
        old, new = old.astype(dtype), new.astype(dtype)
        # Chosen among arrays of the batch: those of `old` may be sharded otherwise.
        one, zero = jnp.ones_like(new), jnp.zeros_like(new)
        keep = lax.select(enough, jnp.asarray(momentum, dtype) * one, one)
        take = lax.select(enough, jnp.asarray(1 - momentum, dtype) * one, zero)
        return keep * old + take * lax.select(enough, new, zero)

    return BatchStats(moved(batch_stats.mean, batch.mean), moved(batch_stats.var, var))
