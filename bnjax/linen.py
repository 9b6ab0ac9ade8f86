"""Batch normalization as a layer of flax.linen."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.linen import dtypes

from bnjax import _validate, functional
from bnjax._validate import Activation

__all__ = ["BatchNorm", "ImmutableBatchStatsError"]


class ImmutableBatchStatsError(errors.ModifyScopeVariableError):
    """Training in a call that does not make the collection "batch_stats" mutable."""

    def __init__(self, layer: str):
        # Not the constructor of Flax's error: its message links to a page that does not
        # exist.
        Exception.__init__(
            self,
            f"{layer}: training updates the collection 'batch_stats', which is not "
            "mutable in this call. Write\n\n"
            "    y, updates = model.apply(variables, x, ..., mutable=['batch_stats'])\n"
            "    batch_stats = updates['batch_stats']\n\n"
            "and pass the new batch_stats to the next step. To evaluate, pass "
            "use_running_average=True.",
        )


class BatchNorm(nn.BatchNorm):
    r"""Batch normalization, a drop-in replacement for flax.linen.BatchNorm.

    $$
    y = f\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    as in `bnjax.batch_norm`, with scale $\gamma$, bias $\beta$, activation $f$ and
    residual $r$. Keywords, defaults and dtypes, and the names, shapes and dtypes of the
    variables, are those of flax.linen.BatchNorm: a checkpoint of one layer loads into
    the other.

    `use_fast_variance=True`, the default, is exact on one CPU or GPU. On a TPU, and if
    devices share statistics, it takes the sums about the running mean. Digits are lost
    only while the running mean is hundreds of standard deviations away from the mean of
    the batch. False is exact everywhere (see `bnjax.batch_norm`).

    With `force_float32_reductions=False` the running statistics have the dtype of the
    parameters, as in Flax. The sums are taken in float32 in any case.

    Attributes:
        unbiased: True keeps the running variance with the factor $m / (m - 1)$ of the
            paper and of PyTorch. False, the default, keeps the biased variance, as Flax
            does.
        activation: applied in the layer: a name of jax.nn, such as "relu", or an
            elementwise function. Its derivative is recomputed from the layer's input.

    The other attributes are those of flax.linen.BatchNorm. `momentum` is the weight of
    the old statistics (PyTorch's 0.1 is 0.9 here). `mask` may also hold weights that
    count as repeats.

    Raises:
        ImmutableBatchStatsError: in training without mutable=["batch_stats"].
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            with the name of the layer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.linen import BatchNorm
        >>> layer = BatchNorm(use_running_average=False, momentum=0.9, unbiased=True)
        >>> x = jnp.array([[1.0, -4.0], [3.0, 4.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> print(updates["batch_stats"]["mean"], updates["batch_stats"]["var"])
        [0.2 0. ] [1.1 4.1]

    References:
        Ioffe & Szegedy (2015), Algorithms 1 and 2.
    """

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
        """Normalize `x` and, in training, update the running statistics.

        Args:
            x: input, of any shape and floating dtype.
            use_running_average: normalize by the running statistics. Pass it here or to
                the constructor.
            mask: which values count: booleans or weights that broadcast to `x`. The
                mask must have the rank of `x` if it could also be read as one entry per
                example.
            residual: added before the activation; shape of `x`.
            update_stats: whether to update the running statistics, which needs a
                mutable collection; None updates them in training only. False in
                training normalizes by the batch and leaves them unchanged. True with
                `use_running_average` normalizes by the old statistics and updates them.

        Returns:
            The output, of the shape of `x`.
        """
        return self._call(
            x,
            use_running_average,
            mask=mask,
            residual=residual,
            update_stats=update_stats,
        )

    # A method that Flax wraps would have its own row in a table of the model.
    @nn.nowrap
    def _call(
        self,
        x: jax.Array,
        use_running_average: bool | None,
        *,
        mask: jax.Array | None,
        residual: jax.Array | None,
        update_stats: bool | None,
        **variant: Any,
    ) -> jax.Array:
        """What the layer does; a variant passes options of its own to `_transform`."""
        layer = f"BatchNorm layer {_validate.layer_name(self.path)}"
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        with _validate.naming(layer):
            _validate.check_flags(
                use_running_average=use_running_average, update_stats=update_stats
            )
            x = _validate.as_input(x)
            features, _ = _validate.split_axes(x.shape, self.axis)
        shape = tuple(x.shape[axis] for axis in features)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        stats_shape, param_shape = self._variable_shapes(shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, stats_shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, stats_shape, stats_dtype)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, param_shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, param_shape, self.param_dtype)

        initializing = self.is_initializing()
        # Too few values to train on, but enough to create the variables.
        single = initializing and x.size <= math.prod(shape)
        if update_stats is None:
            update_stats = not use_running_average
        updating = update_stats and not initializing
        if updating and not self.is_mutable_collection("batch_stats"):
            raise ImmutableBatchStatsError(layer)
        with _validate.naming(layer):
            y, batch_stats = self._transform(
                x,
                scale,
                bias,
                functional.BatchStats(mean.value, var.value),
                use_running_average=use_running_average or single,
                axis=self.axis,
                momentum=self.momentum,
                epsilon=self.epsilon,
                unbiased=self.unbiased,
                update_stats=updating,
                use_fast_variance=self.use_fast_variance,
                mask=_validate.broadcast_mask(mask, x.shape),
                axis_name=None if initializing else self.axis_name,
                axis_index_groups=None if initializing else self.axis_index_groups,
                activation=self.activation,
                residual=residual,
                dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
                **variant,
            )
        if updating:
            batch_dtype = jnp.dtype(self.dtype or x.dtype)
            if self.force_float32_reductions:
                batch_dtype = _validate.promoted(batch_dtype, jnp.float32)
            # The variance of complex inputs is real.
            real = jnp.finfo(batch_dtype).dtype
            for variable, new, dtype in (
                (mean, batch_stats.mean, batch_dtype),
                (var, batch_stats.var, real),
            ):
                kept = _validate.promoted(variable.value.dtype, dtype)
                variable.value = new.astype(kept)
        return y

    @nn.nowrap
    def _variable_shapes(
        self, features: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the statistics and of the parameters; a variant has others."""
        return features, features

    @nn.nowrap
    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: functional.BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, functional.BatchStats]:
        """Apply `bnjax.batch_norm`; a variant applies another function."""
        return functional.batch_norm(x, scale, bias, batch_stats, **options)
