"""Batch normalization as a layer of flax.nnx."""

from typing import Any

import jax
from flax import nnx
from jax import lax

from bnjax import _validate, functional
from bnjax._validate import Activation

__all__ = ["BatchNorm"]


class BatchNorm(nnx.BatchNorm):
    r"""Batch normalization, a drop-in replacement for flax.nnx.BatchNorm.

    $$
    y = f\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    as in `bnjax.batch_norm`, with scale $\gamma$, bias $\beta$, activation $f$ and
    residual $r$. Keywords, defaults and dtypes, and the names, shapes and dtypes of the
    variables, are those of flax.nnx.BatchNorm: a checkpoint of one layer loads into the
    other.

    `use_fast_variance=True`, the default, is exact on one CPU or GPU. On a TPU, and if
    devices share statistics, it takes the sums about the running mean. Digits are lost
    only while the running mean is hundreds of standard deviations away from the mean of
    the batch. False is exact everywhere (see `bnjax.batch_norm`).

    Args:
        num_features: number of channels.
        unbiased: True keeps the running variance with the factor $m / (m - 1)$ of the
            paper and of PyTorch. False, the default, keeps the biased variance, as Flax
            does.
        activation: applied in the layer: a name of jax.nn, such as "relu", or an
            elementwise function. Its derivative is recomputed from the layer's input.
        **kwargs: the arguments of flax.nnx.BatchNorm, including `rngs`. `momentum` is
            the weight of the old statistics (PyTorch's 0.1 is 0.9 here).

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            with the number of features of the layer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.nnx import BatchNorm
        >>> layer = BatchNorm(2, momentum=0.9, unbiased=True, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0, -4.0], [3.0, 4.0]]))
        >>> print(layer.mean[...], layer.var[...])
        [0.2 0. ] [1.1 4.1]

    References:
        Ioffe & Szegedy (2015), Algorithms 1 and 2.
    """

    def __init__(
        self,
        num_features: int,
        *,
        unbiased: bool = False,
        activation: Activation | None = None,
        **kwargs,
    ):
        super().__init__(num_features, **kwargs)
        self.unbiased = unbiased
        self.activation = activation

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
            use_running_average: normalize by the running statistics. It overrides the
                attribute that the constructor, `train()` and `eval()` set.
            mask: which values count: booleans or weights that broadcast to `x`. The
                mask must have the rank of `x` if it could also be read as one entry per
                example.
            residual: added before the activation; shape of `x`.
            update_stats: whether to update the running statistics; None updates them in
                training only. False in training normalizes by the batch and leaves them
                unchanged. True with `use_running_average` normalizes by the old
                statistics and updates them.

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
        if use_running_average is None:
            use_running_average = self.use_running_average
        layer = f"BatchNorm layer of {self.num_features} features"
        if use_running_average is None:
            raise ValueError(
                f"{layer}: use_running_average is None; expected True or False, from "
                "the constructor, from the call, or from model.train() / model.eval()."
            )
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        with _validate.naming(layer):
            _validate.check_flags(
                use_running_average=use_running_average, update_stats=update_stats
            )
            if update_stats is None:
                update_stats = not use_running_average
            x = _validate.as_input(x)
            cast, mean, var, scale, bias = self.promote_dtype(
                (x, self.mean[...], self.var[...], scale, bias), dtype=self.dtype
            )
            if update_stats or not use_running_average:
                # Not the copies that were cast to a half-precision `dtype`.
                mean, var = self.mean[...], self.var[...]
            # An input that would only be widened stays as it is: the gradient keeps it.
            widened = _validate.promoted(x.dtype, cast.dtype) == cast.dtype
            y, batch_stats = self._transform(
                x if widened else cast,
                scale,
                bias,
                functional.BatchStats(mean, var),
                use_running_average=use_running_average,
                axis=self.axis,
                momentum=self.momentum,
                epsilon=self.epsilon,
                unbiased=self.unbiased,
                update_stats=update_stats,
                use_fast_variance=self.use_fast_variance,
                mask=_validate.broadcast_mask(mask, x.shape),
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                activation=self.activation,
                residual=residual,
                dtype=cast.dtype,
                **variant,
            )
        if update_stats:
            for kept, new in (
                (self.mean, batch_stats.mean),
                (self.var, batch_stats.var),
            ):
                kept[...] = lax.stop_gradient(new).astype(kept.dtype)
        return y

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
