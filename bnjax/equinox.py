"""Batch normalization as a layer of Equinox."""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp

from bnjax import _validate, functional
from bnjax._validate import Activation

__all__ = ["BatchNorm"]


class BatchNorm(eqx.nn.StatefulLayer):
    r"""Batch normalization, a drop-in replacement for equinox.nn.BatchNorm.

    $$
    y = f\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    as in `bnjax.batch_norm`, with weight $\gamma$, bias $\beta$, activation $f$ and
    residual $r$. The layer sees one example, inside a `jax.vmap` (or `jax.pmap`) that
    names the axis of the batch. The output has the dtype of `x`.

    In training, the mean and variance are those of all examples of `axis_name`. The
    running statistics are in the `eqx.nn.State`. They start at mean 0 and variance 1,
    as in PyTorch and Flax, and become momentum * old + (1 - momentum) * batch. They are
    float32 even if `dtype` is half precision.

    Args:
        input_size: number of channels, the first dimension of `x`.
        axis_name: name of the axis of the batch in `jax.vmap` or `jax.pmap`, or a
            sequence of names of nested maps whose examples are one batch.
        eps: $\epsilon$, added to the variance; positive.
        channelwise_affine: whether the layer has a weight and a bias.
        momentum: weight of the old statistics (PyTorch's 0.1 is 0.9 here).
        inference: normalize by the running statistics and leave them unchanged.
            `eqx.nn.inference_mode` sets it.
        dtype: dtype of the weight and the bias; JAX's default floating dtype if None.
        mode: "batch", which Equinox recommends. Equinox's "ema" is refused.
        unbiased: True keeps the running variance with the factor $m / (m - 1)$ of the
            paper and of PyTorch. False, the default, keeps the biased variance, as
            Equinox does.
        use_fast_variance: True takes the sums about the running mean, in one collective
            instead of two. Digits of the variance are lost while the running mean is
            hundreds of standard deviations away from the mean of the batch (see
            `bnjax.batch_norm`). False, the default, is exact, as Equinox is.
        activation: applied in the layer: a name of jax.nn, such as "relu", or an
            elementwise function. Its derivative is recomputed from the layer's input.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            with the number of features of the layer.

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from bnjax.equinox import BatchNorm
        >>> layer, state = eqx.nn.make_with_state(BatchNorm)(2, "batch", momentum=0.9)
        >>> x = jnp.array([[1.0, -4.0], [3.0, 4.0]])
        >>> axes = {"in_axes": (0, None), "out_axes": (0, None)}
        >>> y, state = jax.vmap(layer, axis_name="batch", **axes)(x, state)
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> stats = state.get(layer.state_index)
        >>> print(stats.mean, stats.var)
        [0.2 0. ] [1.  2.5]

    References:
        Ioffe & Szegedy (2015), Algorithms 1 and 2.
    """

    weight: jax.Array | None
    bias: jax.Array | None
    state_index: eqx.nn.StateIndex[functional.BatchStats]
    # A leaf of the tree, because eqx.nn.inference_mode replaces it.
    inference: bool
    # Static, because a name is not an array:
    # github.com/patrick-kidger/equinox/issues/1074.
    axis_name: Any = eqx.field(static=True)
    input_size: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    mode: Literal["batch"] = eqx.field(static=True)
    unbiased: bool = eqx.field(static=True)
    use_fast_variance: bool = eqx.field(static=True)
    activation: Activation | None = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable],
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype=None,
        mode: Literal["batch"] = "batch",
        *,
        unbiased: bool = False,
        use_fast_variance: bool = False,
        activation: Activation | None = None,
    ):
        layer = f"BatchNorm layer of {input_size} features"
        if mode != "batch":
            raise ValueError(
                f"{layer}: mode={mode!r}; expected 'batch'. Equinox's 'ema' normalizes "
                "by the running statistics in training, which is unstable "
                "(https://github.com/patrick-kidger/equinox/issues/659). To normalize "
                "by the old running statistics and update them, call the layer with "
                "inference=True, update_stats=True."
            )
        if axis_name is None:
            raise ValueError(
                f"{layer}: axis_name=None; expected the axis_name of the jax.vmap over "
                "the batch, because the layer sees one example."
            )
        dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
        self.weight = jnp.ones(input_size, dtype) if channelwise_affine else None
        self.bias = jnp.zeros(input_size, dtype) if channelwise_affine else None
        dtype = _validate.promoted(dtype, jnp.float32)
        self.state_index = eqx.nn.StateIndex(
            functional.BatchStats(
                mean=jnp.zeros(input_size, dtype),
                # The variance of complex inputs is real.
                var=jnp.ones(input_size, jnp.finfo(dtype).dtype),
            )
        )
        self.inference = inference
        if isinstance(axis_name, Sequence) and not isinstance(axis_name, str):
            axis_name = tuple(axis_name)
        self.axis_name = axis_name
        self.input_size = input_size
        self.eps = eps
        self.channelwise_affine = channelwise_affine
        self.momentum = momentum
        self.mode = mode
        self.unbiased = unbiased
        self.use_fast_variance = use_fast_variance
        self.activation = activation

    def __call__(
        self,
        x: jax.Array,
        state: eqx.nn.State,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalize one example and, in training, update the running statistics.

        Args:
            x: shape (input_size, dim_1, ..., dim_N), of any floating dtype.
            state: holds the running statistics.
            key: ignored, as in Equinox.
            inference: overrides the attribute that the constructor and
                `eqx.nn.inference_mode` set.
            mask: which values of the example count: booleans or weights that broadcast
                to `x`; a scalar for the whole example.
            residual: added before the activation; shape of `x`.
            update_stats: whether to update the running statistics; None updates them in
                training only. False in training normalizes by the batch and leaves them
                unchanged. True in inference normalizes by the old statistics and
                updates them.

        Returns:
            The output, of the shape and dtype of `x`, and the new state.
        """
        del key
        if inference is None:
            inference = self.inference
        layer = f"BatchNorm layer of {self.input_size} features"
        if isinstance(inference, jax.core.Tracer):
            raise TypeError(
                f"{layer}: inference is a traced value; expected a Python bool. "
                "Compile with eqx.filter_jit instead of jax.jit: it does not trace "
                "values that are not arrays."
            )
        batch_stats = state.get(self.state_index)
        with _validate.naming(layer):
            x = _validate.as_input(x)
            y, new = functional.batch_norm(
                x,
                self.weight,
                self.bias,
                batch_stats,
                use_running_average=inference,
                axis=0,
                momentum=self.momentum,
                epsilon=self.eps,
                unbiased=self.unbiased,
                update_stats=update_stats,
                use_fast_variance=self.use_fast_variance,
                mask=_validate.broadcast_mask(mask, x.shape),
                axis_name=self.axis_name,
                activation=self.activation,
                residual=residual,
            )
        if new is not batch_stats:
            # The state keeps its own dtype, also for float64 inputs.
            state = state.set(
                self.state_index, jax.tree.map(_as_kept, batch_stats, new)
            )
        return y, state


def _as_kept(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new` in the dtype of `old`; complex values stay complex, for `set` to refuse."""
    if jnp.iscomplexobj(new) and not jnp.iscomplexobj(old):
        return new
    return new.astype(old.dtype)
