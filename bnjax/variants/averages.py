"""Running statistics without initial values: equal-weight and debiased averages."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

import bnjax.linen
import bnjax.nnx
from bnjax import _validate, functional
from bnjax.functional import BatchStats, Moments

__all__ = [
    "AveragedBatchNorm",
    "AveragedStats",
    "NnxAveragedBatchNorm",
    "averaged_batch_norm",
    "update_averaged_stats",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AveragedStats:
    r"""Running statistics that are an average of batches only, not of initial values.

    Attributes:
        batch_stats: mean and variance, for use in inference as they are, shape
            (features,).
        weight: number of batches in the average, where a batch of $k$ updates ago
            counts $\rho^k$ at momentum $\rho$. It is 0 before the first update and
            tends to $1 / (1 - \rho)$. It is kept per channel, because a mask may hide
            some channels; float32 or float64, shape (features,).
    """

    batch_stats: BatchStats
    weight: jax.Array

    @classmethod
    def init(cls, features, dtype=jnp.float32) -> "AveragedStats":
        """Initial statistics, before the first update: mean 0, variance 1, weight 0.

        Args:
            features: number of channels, or the shape of the feature axes.
            dtype: float32, or float64 for float64 inputs.

        Returns:
            AveragedStats of arrays of shape (features,).
        """
        return cls(BatchStats.init(features, dtype), jnp.zeros(features, dtype))


def update_averaged_stats(
    stats: AveragedStats,
    batch: Moments,
    *,
    momentum: float | jax.Array | None = 0.99,
    unbiased: bool = True,
) -> AveragedStats:
    r"""Add a batch to an average that does not depend on its initial values.

    $$
    w_t = \rho w_{t-1} + 1, \quad
    \mu_t = \frac{\rho w_{t-1} \mu_{t-1} + \mu_B}{w_t}, \quad w_0 = 0
    $$

    and the variance likewise: this is `bnjax.update_batch_stats` with a momentum of
    $\rho w_{t-1} / w_t$. If the momentum $\rho$ is constant, $w_t$ is
    $(1 - \rho^t) / (1 - \rho)$, and $\mu_t$ is the moving average that starts at 0,
    divided by $1 - \rho^t$, as in Adam. At a momentum of 1 it is the mean of all
    batches. The momentum may change from step to step.

    Args:
        stats: the old statistics.
        batch: Moments of all the values of this update. A channel of one value or none
            keeps its statistics and its weight.
        momentum: $\rho$, weight of a batch relative to the next batch, in [0, 1]. With
            None or 1 all batches have the same weight, as with PyTorch's
            `momentum=None`.
        unbiased: as in `bnjax.update_batch_stats`.

    Returns:
        The new AveragedStats.

    Raises:
        TypeError, ValueError: as `bnjax.update_batch_stats`, and for a weight that does
            not have the shape of the mean.

    Examples:
        >>> import bnjax, jax.numpy as jnp
        >>> from bnjax.variants.averages import AveragedStats, update_averaged_stats
        >>> first, second = (
        ...     bnjax.moments(jnp.array([[a], [a + 2.0]])) for a in (4.0, 9.0)
        ... )
        >>> stats = update_averaged_stats(AveragedStats.init(1), first, momentum=0.5)
        >>> print(stats.batch_stats.mean, stats.weight)
        [5.] [1.]
        >>> stats = update_averaged_stats(stats, second, momentum=0.5)
        >>> print(stats.batch_stats.mean.round(4), stats.weight)
        [8.3333] [1.5]

    References:
        Kingma & Ba (2015), "Adam", section 3.
    """
    _check_momentum(momentum)
    if jnp.shape(stats.weight) != jnp.shape(stats.batch_stats.mean):
        raise ValueError(
            f"update_averaged_stats: weight has shape {jnp.shape(stats.weight)}; "
            f"expected {jnp.shape(stats.batch_stats.mean)}, the shape of the mean."
        )
    dtype = _validate.promoted(stats.weight.dtype, batch.count.dtype)
    weight = stats.weight.astype(dtype)
    kept = weight if momentum is None else jnp.asarray(momentum, dtype) * weight
    batch_stats = functional.update_batch_stats(
        stats.batch_stats, batch, momentum=kept / (kept + 1), unbiased=unbiased
    )
    # As in `update_batch_stats`, one value changes nothing.
    return AveragedStats(batch_stats, jnp.where(batch.count > 1, kept + 1, weight))


def averaged_batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    stats: AveragedStats,
    *,
    use_running_average: bool = False,
    momentum: float | jax.Array | None = 0.99,
    unbiased: bool = True,
    update_stats: bool | None = None,
    use_fast_variance: bool = True,
    **options: Any,
) -> tuple[jax.Array, AveragedStats]:
    r"""`bnjax.batch_norm` with running statistics updated by `update_averaged_stats`.

    The output is that of `bnjax.batch_norm`, in training and in inference. So are the
    arguments, except for `stats` and `momentum`.

    Args:
        x: input.
        scale: $\gamma$, or None for ones.
        bias: $\beta$, or None for zeros.
        stats: the old AveragedStats.
        use_running_average: normalize by `stats`.
        momentum: as in `update_averaged_stats`; None for an equal-weight average.
        unbiased: True keeps the running variance of the paper and of PyTorch, False
            that of Flax.
        update_stats: whether to update `stats`, as in `bnjax.batch_norm`.
        use_fast_variance: as in `bnjax.batch_norm`.
        **options: all other arguments of `bnjax.batch_norm`.

    Returns:
        The output, and the new AveragedStats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.averages import AveragedStats, averaged_batch_norm
        >>> x = jnp.array([[4.0], [8.0]])
        >>> _, stats = averaged_batch_norm(x, None, None, AveragedStats.init(1))
        >>> y, _ = averaged_batch_norm(
        ...     x, None, None, stats, use_running_average=True, momentum=None
        ... )
        >>> print(stats.batch_stats.mean, y.ravel().round(4))
        [6.] [-0.7071  0.7071]
    """
    _check_momentum(momentum)
    _validate.check_flags(
        use_running_average=use_running_average,
        update_stats=update_stats,
        unbiased=unbiased,
        use_fast_variance=use_fast_variance,
    )
    if update_stats is None:
        update_stats = not use_running_average
    if use_running_average:
        y, _ = functional.batch_norm(
            x, scale, bias, stats.batch_stats, use_running_average=True, **options
        )
        if not update_stats:
            return y, stats
        names = ("axis", "mask", "axis_name", "axis_index_groups")
        batch = functional.moments(x, **{n: options[n] for n in names if n in options})
    else:
        origin = stats.batch_stats.mean if use_fast_variance else None
        y, batch = functional.normalize_batch(x, scale, bias, origin=origin, **options)
    if not update_stats:
        return y, stats
    return y, update_averaged_stats(stats, batch, momentum=momentum, unbiased=unbiased)


def _check_momentum(momentum: float | jax.Array | None) -> None:
    if momentum is not None:
        _validate.check_momentum(momentum)


class AveragedBatchNorm(bnjax.linen.BatchNorm):
    """`bnjax.linen.BatchNorm` whose statistics do not depend on their initial values.

    `update_averaged_stats` updates them. "mean" and "var" are those of
    `bnjax.linen.BatchNorm`, and the collection "batch_stats" also has a "weight" of the
    same shape. Variables without a "weight" are enough for evaluation. Training with
    such variables restarts the average at the first step.

    Attributes:
        momentum: weight of a batch relative to the next batch; None for an equal-weight
            average of all batches, as with PyTorch's `momentum=None`.

    The other attributes are those of `bnjax.linen.BatchNorm`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.averages import AveragedBatchNorm
        >>> layer = AveragedBatchNorm(use_running_average=False, momentum=None)
        >>> x = jnp.array([[4.0], [8.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> print(updates["batch_stats"]["mean"], updates["batch_stats"]["var"])
        [6.] [4.]
    """

    momentum: Any = 0.99

    @nn.nowrap
    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        if not (options["update_stats"] or self.is_initializing()):
            del options["momentum"]
            return super()._transform(x, scale, bias, batch_stats, **options)
        shape = batch_stats.mean.shape
        weight = self.variable("batch_stats", "weight", jnp.zeros, shape, jnp.float32)
        stats = AveragedStats(batch_stats, weight.value)
        y, stats = averaged_batch_norm(x, scale, bias, stats, **options)
        if options["update_stats"]:
            weight.value = stats.weight.astype(weight.value.dtype)
        return y, stats.batch_stats


class NnxAveragedBatchNorm(bnjax.nnx.BatchNorm):
    """`bnjax.nnx.BatchNorm` whose statistics do not depend on their initial values.

    `update_averaged_stats` updates them. Besides `mean` and `var`, the layer has a
    `weight`, an nnx.BatchStat of the same shape.

    Args:
        num_features: number of channels.
        momentum: weight of a batch relative to the next batch; None for an equal-weight
            average of all batches, as with PyTorch's `momentum=None`.
        **kwargs: the arguments of `bnjax.nnx.BatchNorm`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.variants.averages import NnxAveragedBatchNorm
        >>> layer = NnxAveragedBatchNorm(1, momentum=None, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[4.0], [8.0]]))
        >>> print(layer.mean[...], layer.var[...], layer.weight[...])
        [6.] [4.] [1.]
    """

    momentum: Any

    def __init__(
        self, num_features: int, *, momentum: float | None = 0.99, **kwargs: Any
    ):
        super().__init__(num_features, **kwargs)
        self.momentum = momentum
        self.weight = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))

    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        stats = AveragedStats(batch_stats, self.weight[...])
        y, new = averaged_batch_norm(x, scale, bias, stats, **options)
        if new is not stats:
            weight = lax.stop_gradient(new.weight)
            self.weight[...] = weight.astype(self.weight.dtype)
        return y, new.batch_stats
