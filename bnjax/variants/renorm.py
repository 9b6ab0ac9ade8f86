"""Batch renormalization: training outputs that stay close to those of inference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from bnjax import _validate, functional
from bnjax._moments import checkpoint_named
from bnjax.functional import BatchStats
from bnjax.linen import BatchNorm
from bnjax.nnx import BatchNorm as NnxBatchNorm

__all__ = [
    "BatchRenorm",
    "NnxBatchRenorm",
    "RenormStats",
    "batch_renorm",
    "d_max_schedule",
    "r_max_schedule",
]

Limit = float | jax.Array | Callable[[jax.Array], float | jax.Array]
"""A number, or a function of the step, such as an Optax schedule."""


def r_max_schedule(step: jax.Array) -> jax.Array:
    """Return the paper's r_max: 1 for 5,000 steps, then linearly to 3 at 40,000.

    Args:
        step: number of updates so far.

    Returns:
        The limit of $r$ and $1 / r$ at this step.

    Examples:
        >>> from bnjax.variants.renorm import r_max_schedule
        >>> print([float(r_max_schedule(step)) for step in (0, 5_000, 22_500, 90_000)])
        [1.0, 1.0, 2.0, 3.0]
    """
    return 1 + 2 * jnp.clip((step - 5_000) / 35_000, 0, 1)


def d_max_schedule(step: jax.Array) -> jax.Array:
    r"""Return the paper's d_max: 0 for 5,000 steps, then linearly to 5 at 25,000.

    Args:
        step: number of updates so far.

    Returns:
        The limit of $\lvert d \rvert$ at this step.

    Examples:
        >>> from bnjax.variants.renorm import d_max_schedule
        >>> print([float(d_max_schedule(step)) for step in (0, 5_000, 15_000, 90_000)])
        [0.0, 0.0, 2.5, 5.0]
    """
    return 5 * jnp.clip((step - 5_000) / 20_000, 0, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RenormStats(BatchStats):
    """Running statistics, and the number of their updates.

    Attributes:
        mean: running mean, float32 (float64 for float64 input), shape (features,).
        var: running variance, of the same dtype and shape.
        step: number of updates, int32, shape ().

    Examples:
        >>> from bnjax.variants.renorm import RenormStats
        >>> RenormStats.init(1)
        RenormStats(mean=Array([0.], dtype=float32), var=Array([1.], dtype=float32), step=Array(0, dtype=int32))
    """  # noqa: E501 - the output of a doctest is one line

    step: jax.Array

    @classmethod
    def init(cls, features, dtype=jnp.float32) -> "RenormStats":
        """Initial statistics, before the first update: mean 0, variance 1, step 0.

        Args:
            features: number of channels, or the shape of the feature axes.
            dtype: float32, or float64 for float64 inputs.

        Returns:
            RenormStats of arrays of shape (features,).
        """
        start = BatchStats.init(features, dtype)
        return cls(start.mean, start.var, jnp.zeros((), jnp.int32))


def batch_renorm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    stats: RenormStats,
    *,
    r_max: Limit = r_max_schedule,
    d_max: Limit = d_max_schedule,
    warmup_steps: int | jax.Array = 0,
    use_running_average: bool = False,
    update_stats: bool | None = None,
    axis: _validate.Axes = -1,
    momentum: float | jax.Array = 0.99,
    unbiased: bool = True,
    epsilon: float | jax.Array = 1e-5,
    use_fast_variance: bool = True,
    mask: jax.Array | None = None,
    activation: _validate.Activation | None = None,
    residual: jax.Array | None = None,
    dtype: Any = None,
    **options: Any,
) -> tuple[jax.Array, RenormStats]:
    r"""Batch renormalization, in training or in inference.

    Let $\mu_B$ be the mean of the batch, $v_B$ its biased variance and
    $\sigma_B = \sqrt{v_B + \epsilon}$. Let $\mu$ and $\sigma$ be the same values for
    the running statistics before the update. In training,

    $$
    \begin{aligned}
    r &= \mathrm{clip}(\sigma_B / \sigma,\; 1 / r_{\max},\; r_{\max}) \\
    d &= \mathrm{clip}((\mu_B - \mu) / \sigma,\; -d_{\max},\; d_{\max}) \\
    y &= f\left(\gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta
    + \text{residual}\right)
    \end{aligned}
    $$

    where $f$ is the activation. $r$ and $d$ are constants in the derivative. If nothing
    is clipped, the normalized value is that of inference, $(x - \mu) / \sigma$. With
    r_max 1 and d_max 0 the output is that of `bnjax.batch_norm`. The new statistics are
    always those of `bnjax.batch_norm`. Inference is `bnjax.batch_norm` itself.

    The paper averages $\sigma_B$. Here the variance is averaged, as in every other
    layer, so that the statistics of one layer fit another layer. Use `unbiased` for
    batches of a few examples: the biased variance is too small by a half in batches of
    two, by a quarter in batches of four. `unbiased=True` is the default of the
    function, but not of the layers.

    Args:
        x: input, as in `bnjax.batch_norm`.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        stats: running statistics and their number of updates.
        r_max: limit of $r$ and $1 / r$, at least 1: a number, or a function of
            `stats.step`, such as an Optax schedule. The default is the paper's.
        d_max: limit of $\lvert d \rvert$, at least 0: a number, or a function of
            `stats.step`. The default is the paper's.
        warmup_steps: while `stats.step` is below it, r = 1 and d = 0, whatever the
            limits. r_max=3 and d_max=5 with 100,000 warm-up steps is the form of
            CrossQ.
        use_running_average: normalize by `stats`.
        update_stats: whether to update the statistics and the step, as in
            `bnjax.batch_norm`.
        axis: the feature axis or axes of `x`.
        momentum: weight of the old statistics; the paper's rate of 0.01 is 0.99 here.
        unbiased: True keeps the running variance with the factor $m / (m - 1)$.
        epsilon: $\epsilon$, added to the variance; positive.
        use_fast_variance: as in `bnjax.batch_norm`.
        mask: which values count, as in `bnjax.batch_norm`.
        activation: $f$, as in `bnjax.batch_norm`.
        residual: added before the activation; shape of `x`.
        dtype: dtype of the output; that of `x` if None.
        **options: `axis_name` and `axis_index_groups`, as in `bnjax.batch_norm`.

    Returns:
        The output, of the shape of `x`, and the new RenormStats.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            for complex inputs, and for limits that are not numbers or are out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.renorm import RenormStats, batch_renorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, stats = batch_renorm(
        ...     x, None, None, RenormStats.init(1), r_max=3.0, d_max=1.5, momentum=0.9
        ... )
        >>> print(y.ravel().round(2))  # r = 1, and d is 2, clipped
        [0.5 2.5]
        >>> print(stats.mean, stats.var, stats.step)
        [0.2] [1.1] 1

    References:
        Ioffe (2017), "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models", Algorithm 1; Bhatt et al. (2024), "CrossQ: Batch
        Normalization in Deep Reinforcement Learning", for the warm-up.
    """
    _validate.check_flags(
        use_running_average=use_running_average,
        update_stats=update_stats,
        unbiased=unbiased,
        use_fast_variance=use_fast_variance,
    )
    if update_stats is None:
        update_stats = not use_running_average
    options |= {"axis": axis, "mask": mask}
    output = {"activation": activation, "residual": residual, "dtype": dtype}
    if use_running_average:
        y, new = functional.batch_norm(
            x,
            scale,
            bias,
            BatchStats(stats.mean, stats.var),
            use_running_average=True,
            update_stats=update_stats,
            momentum=momentum,
            unbiased=unbiased,
            epsilon=epsilon,
            use_fast_variance=use_fast_variance,
            **options,
            **output,
        )
        moved = RenormStats(new.mean, new.var, stats.step + 1)
        return y, moved if update_stats else stats
    x = _validate.as_input(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"batch_norm: x has dtype {x.dtype.name}; expected real numbers, because r "
            "and d are clipped. Normalize real and imaginary parts as features."
        )
    scale = None if scale is None else _validate.as_input(scale, "scale")
    bias = None if bias is None else _validate.as_input(bias, "bias")
    running = {"mean": stats.mean, "var": stats.var}
    _check_features(x.shape, axis, {"scale": scale, "bias": bias, **running})
    _validate.check_epsilon(epsilon)
    limits = _limits(stats.step, r_max, d_max, warmup_steps)
    output["dtype"] = _validate.as_dtype(dtype, x.dtype)
    origin = stats.mean if use_fast_variance else None

    # r and d are constants in the derivative: the rest is batch norm with another scale
    # and bias. XLA computes the moments once.
    _, batch = functional.normalize_batch(x, origin=origin, epsilon=epsilon, **options)
    r, d = checkpoint_named(_corrections(batch, stats, epsilon, *limits))
    shift = d if scale is None else d * scale.astype(r.dtype)
    y, batch = functional.normalize_batch(
        x,
        r if scale is None else r * scale.astype(r.dtype),
        shift if bias is None else shift + bias.astype(r.dtype),
        origin=origin,
        epsilon=epsilon,
        **options,
        **output,
    )
    if not update_stats:
        return y, stats
    new = functional.update_batch_stats(
        BatchStats(stats.mean, stats.var), batch, momentum=momentum, unbiased=unbiased
    )
    return y, RenormStats(new.mean, new.var, stats.step + 1)


def _check_features(shape, axis, arrays):
    # Checked before r and d, which would broadcast.
    features = tuple(shape[i] for i in _validate.split_axes(shape, axis)[0])
    for name, value in arrays.items():
        _validate.check_features(value, name, features, shape)


def _limits(step, r_max: Any, d_max: Any, warmup_steps):
    """The limits of r and d at this step."""
    r_max = r_max(step) if callable(r_max) else r_max
    d_max = d_max(step) if callable(d_max) else d_max
    _validate.check_number(r_max, "r_max", lambda r: r >= 1, "a number of at least 1")
    _validate.check_number(d_max, "d_max", lambda d: d >= 0, "a number of at least 0")
    _validate.check_number(
        warmup_steps, "warmup_steps", lambda n: n >= 0, "a number of steps, 0 for none"
    )
    warm = step >= warmup_steps
    return jnp.where(warm, r_max, 1.0), jnp.where(warm, d_max, 0.0)


def _corrections(batch, stats, epsilon, r_max, d_max):
    """Return r and d, which have no derivative."""
    dtype = batch.mean.dtype
    mean, var, epsilon, r_max, d_max = (
        jnp.asarray(value, dtype)
        for value in (stats.mean, stats.var, epsilon, r_max, d_max)
    )
    inv_std = lax.rsqrt(var + epsilon)
    r = jnp.sqrt(batch.var + epsilon) * inv_std
    d = (batch.mean - mean) * inv_std
    r, d = jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)
    return lax.stop_gradient((r, d))


class BatchRenorm(BatchNorm):
    r"""`bnjax.linen.BatchNorm` with batch renormalization in training.

    Its variables are those of `bnjax.linen.BatchNorm` and "step" in "batch_stats", the
    number of updates. In inference it is the same as `bnjax.linen.BatchNorm`. Use
    `unbiased=True` for batches of a few examples (see `batch_renorm`).

    Attributes:
        r_max: limit of $r$ and $1 / r$, at least 1; a number or a schedule of the step.
        d_max: limit of $\lvert d \rvert$, at least 0; a number or a schedule of the
            step.
        warmup_steps: number of updates with r = 1 and d = 0 before the limits apply.

    The other attributes are those of `bnjax.linen.BatchNorm`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.variants.renorm import BatchRenorm
        >>> layer = BatchRenorm(use_running_average=False, r_max=3.0, d_max=1.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> print(y.ravel().round(2), updates["batch_stats"]["step"])
        [0.5 2.5] 1

    References:
        Ioffe (2017), "Batch Renormalization", Algorithm 1.
    """

    r_max: Limit = r_max_schedule
    d_max: Limit = d_max_schedule
    warmup_steps: int = 0

    @nn.nowrap
    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        y, stats = batch_renorm(
            x,
            scale,
            bias,
            RenormStats(batch_stats.mean, batch_stats.var, step.value),
            r_max=self.r_max,
            d_max=self.d_max,
            warmup_steps=self.warmup_steps,
            **options,
        )
        if options["update_stats"]:
            step.value = stats.step
        return y, stats


class NnxBatchRenorm(NnxBatchNorm):
    r"""`bnjax.nnx.BatchNorm` with batch renormalization in training.

    Its variables are those of `bnjax.nnx.BatchNorm` and `step`, an nnx.BatchStat with
    the number of updates. In inference it is the same as `bnjax.nnx.BatchNorm`. Use
    `unbiased=True` for batches of a few examples (see `batch_renorm`).

    Args:
        num_features: number of channels.
        r_max: limit of $r$ and $1 / r$, at least 1; a number or a schedule of the step.
        d_max: limit of $\lvert d \rvert$, at least 0; a number or a schedule of the
            step.
        warmup_steps: number of updates with r = 1 and d = 0 before the limits apply.
        **kwargs: the arguments of `bnjax.nnx.BatchNorm`, including `rngs`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.variants.renorm import NnxBatchRenorm
        >>> layer = NnxBatchRenorm(1, r_max=3.0, d_max=1.5, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.array([[1.0], [3.0]])).ravel().round(2), layer.step[...])
        [0.5 2.5] 1

    References:
        Ioffe (2017), "Batch Renormalization", Algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: Limit = r_max_schedule,
        d_max: Limit = d_max_schedule,
        warmup_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(num_features, **kwargs)
        self.r_max, self.d_max, self.warmup_steps = r_max, d_max, warmup_steps
        self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        y, stats = batch_renorm(
            x,
            scale,
            bias,
            RenormStats(batch_stats.mean, batch_stats.var, self.step[...]),
            r_max=self.r_max,
            d_max=self.d_max,
            warmup_steps=self.warmup_steps,
            **options,
        )
        if options["update_stats"]:
            self.step[...] = stats.step
        return y, stats
