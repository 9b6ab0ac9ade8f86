"""Whitening batch normalization as a layer of flax.linen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from bnjax import _validate
from bnjax._moments import AxisName
from bnjax._validate import Activation
from bnjax.functional import AxisIndexGroups
from bnjax.linen import ImmutableBatchStatsError
from bnjax.variants.whitening.covariance import ChannelGroups, WhiteningStats
from bnjax.variants.whitening.functional import whitening_batch_norm

__all__ = ["WhiteningBatchNorm"]


class WhiteningBatchNorm(nn.Module):
    """`bnjax.variants.whitening.whitening_batch_norm` as a layer of flax.linen.

    The variables are those of `bnjax.linen.BatchNorm`, with the covariances "cov"
    instead of the variance: params "scale" and "bias", batch_stats "mean" of shape
    (features,) and "cov" of shape (groups, group_size, group_size).

    Attributes:
        use_running_average: whiten by the running statistics. Pass it here or in the
            call.
        group_size: number of channels whitened together, a divisor of the features;
            None for all.
        iterations: steps of Newton's method (IterNorm); None for ZCA.
        unbiased: True keeps the running covariance with the factor $m / (m - 1)$.
        activation: applied in the layer: a name of jax.nn, such as "relu", or an
            elementwise function.

    The other attributes, and their defaults, are those of `bnjax.linen.BatchNorm`.

    Raises:
        ImmutableBatchStatsError: in training without mutable=["batch_stats"].
        TypeError, ValueError, NameError, NotImplementedError: as
            `bnjax.variants.whitening.whitening_batch_norm`, with the name of the layer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.variants.whitening.linen import WhiteningBatchNorm
        >>> layer = WhiteningBatchNorm(use_running_average=False, group_size=2)
        >>> x = jax.random.normal(jax.random.key(0), (32, 4))
        >>> variables = layer.init(jax.random.key(1), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["cov"].shape
        (2, 2, 2)

    References:
        Huang et al. (2018, 2019).
    """

    use_running_average: bool | None = None
    group_size: int | None = 16
    iterations: int | None = 5
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    unbiased: bool = False
    activation: Activation | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Whiten `x` and, in training, update the running statistics.

        Args:
            x: input, of any shape and real floating dtype.
            use_running_average: whiten by the running statistics.
            mask: which values count: booleans or weights that broadcast to `x`, equal
                for all channels.
            residual: added before the activation; shape of `x`.
            update_stats: as in `bnjax.linen.BatchNorm`.

        Returns:
            The output, of the shape of `x`.
        """
        name = f"WhiteningBatchNorm layer {_validate.layer_name(self.path)}"
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        with _validate.naming(name):
            _validate.check_flags(
                use_running_average=running, update_stats=update_stats
            )
            x = _validate.as_input(x)
            groups = ChannelGroups.of(x.shape, self.axis, self.group_size)
        shape = (x.shape[groups.axis],)
        start = functools.partial(WhiteningStats.init, *shape, groups.size)
        mean = self.variable("batch_stats", "mean", lambda: start().mean)
        cov = self.variable("batch_stats", "cov", lambda: start().cov)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        initializing = self.is_initializing()
        # Too few values to train on, but enough to create the variables.
        single = initializing and x.size <= shape[0]
        if update_stats is None:
            update_stats = not running
        updating = update_stats and not initializing
        if updating and not self.is_mutable_collection("batch_stats"):
            raise ImmutableBatchStatsError(name)
        with _validate.naming(name):
            y, new = whitening_batch_norm(
                x,
                scale,
                bias,
                WhiteningStats(mean.value, cov.value),
                use_running_average=running or single,
                update_stats=updating,
                mask=_validate.broadcast_mask(mask, x.shape),
                residual=residual,
                axis_name=None if initializing else self.axis_name,
                axis_index_groups=None if initializing else self.axis_index_groups,
                dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
                group_size=self.group_size,
                iterations=self.iterations,
                axis=self.axis,
                momentum=self.momentum,
                epsilon=self.epsilon,
                unbiased=self.unbiased,
                use_fast_variance=self.use_fast_variance,
                activation=self.activation,
            )
        if updating:
            mean.value, cov.value = new.mean, new.cov
        return y
