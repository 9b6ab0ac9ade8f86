"""Whitening batch normalization as a layer of flax.nnx."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes
from jax import lax

from bnjax import _validate
from bnjax._moments import AxisName
from bnjax._validate import Activation
from bnjax.functional import AxisIndexGroups
from bnjax.variants.whitening.covariance import WhiteningStats
from bnjax.variants.whitening.functional import whitening_batch_norm

__all__ = ["WhiteningBatchNorm"]


class WhiteningBatchNorm(nnx.Module):
    """`bnjax.variants.whitening.whitening_batch_norm` as a layer of flax.nnx.

    `mean` and `cov` are nnx.BatchStat, `scale` and `bias` are nnx.Param. Their shapes
    are those of `bnjax.variants.whitening.linen.WhiteningBatchNorm`. `model.train()`
    and `model.eval()` set `use_running_average`.

    Args:
        num_features: number of channels.
        rngs: random streams for the initializers.
        use_running_average: whiten by the running statistics.
        group_size: number of channels whitened together, a divisor of `num_features`;
            None for all.
        iterations: steps of Newton's method (IterNorm); None for ZCA.
        axis: the feature axis of the input.
        momentum: weight of the old statistics, in [0, 1].
        epsilon: added to the diagonal of the covariance; positive.
        dtype: dtype of the output; that of the input and the parameters if None.
        param_dtype: dtype of the parameters.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis or axes whose devices share statistics.
        axis_index_groups: groups of that axis.
        use_fast_variance: as in `bnjax.variants.whitening.whitening_batch_norm`.
        unbiased: True keeps the running covariance with the factor $m / (m - 1)$.
        activation: applied in the layer: a name of jax.nn, such as "relu", or an
            elementwise function.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as
            `bnjax.variants.whitening.whitening_batch_norm`, with the number of features
            of the layer.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> from bnjax.variants.whitening.nnx import WhiteningBatchNorm
        >>> layer = WhiteningBatchNorm(4, group_size=2, rngs=nnx.Rngs(0))
        >>> y = layer(jax.random.normal(jax.random.key(0), (32, 4)))
        >>> layer.cov.shape
        (2, 2, 2)
    """

    def __init__(
        self,
        num_features: int,
        *,
        rngs: nnx.Rngs,
        use_running_average: bool = False,
        group_size: int | None = 16,
        iterations: int | None = 5,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        scale_init: nnx.Initializer = nnx.initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        unbiased: bool = False,
        activation: Activation | None = None,
    ):
        self.name = f"WhiteningBatchNorm layer of {num_features} features"
        self.num_features, self.use_running_average = num_features, use_running_average
        self.group_size, self.iterations, self.axis = group_size, iterations, axis
        self.momentum, self.epsilon, self.dtype = momentum, epsilon, dtype
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups
        self.use_fast_variance, self.unbiased = use_fast_variance, unbiased
        self.activation = activation
        with _validate.naming(self.name):
            start = WhiteningStats.init(num_features, group_size)
        self.mean, self.cov = nnx.BatchStat(start.mean), nnx.BatchStat(start.cov)

        def param(init, used):
            if not used:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype))

        self.scale = param(scale_init, use_scale)
        self.bias = param(bias_init, use_bias)

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
            use_running_average: overrides the attribute.
            mask: which values count: booleans or weights that broadcast to `x`, equal
                for all channels.
            residual: added before the activation; shape of `x`.
            update_stats: as in `bnjax.nnx.BatchNorm`.

        Returns:
            The output, of the shape of `x`.
        """
        running = use_running_average
        if running is None:
            running = self.use_running_average
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        with _validate.naming(self.name):
            x = _validate.as_input(x)
            y, new = whitening_batch_norm(
                x,
                scale,
                bias,
                WhiteningStats(self.mean[...], self.cov[...]),
                use_running_average=running,
                update_stats=update_stats,
                mask=_validate.broadcast_mask(mask, x.shape),
                residual=residual,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
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
        if not running if update_stats is None else update_stats:
            for kept, value in ((self.mean, new.mean), (self.cov, new.cov)):
                kept[...] = lax.stop_gradient(value).astype(kept.dtype)
        return y
