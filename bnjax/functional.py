"""Batch normalization as pure functions: statistics go in, new statistics come out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax import _validate
from bnjax._derivative import Operands, Transform, normalize_by, normalize_by_batch
from bnjax._moments import (
    CHECKPOINT_NAME,
    AxisName,
    BatchStats,
    Moments,
    Reduction,
    checkpoint_named,
    complex_moments,
    moments_about_origin,
)
from bnjax._validate import Activation, Axes

__all__ = [
    "CHECKPOINT_NAME",
    "BatchStats",
    "Moments",
    "batch_norm",
    "checkpoint_policy",
    "moments",
    "normalize",
    "normalize_batch",
    "update_batch_stats",
]

AxisIndexGroups = Sequence[Sequence[int]]

_INPUT_NAME = "batch_norm_input"
_save_named = jax.checkpoint_policies.save_only_these_names(
    _INPUT_NAME, CHECKPOINT_NAME
)


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
    update_stats: bool | None = None,
    use_fast_variance: bool = True,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype=None,
) -> tuple[jax.Array, BatchStats]:
    r"""Batch normalization, in training or in inference.

    $$
    y = f\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    with `scale` $\gamma$, `bias` $\beta$, `activation` $f$ and `residual` $r$. In
    training, $\mu$ and $\sigma^2$ are the mean and the biased variance of the batch.
    With `use_running_average`, they are the running statistics.

    In training, each running statistic becomes momentum * old + (1 - momentum) * batch.
    With `unbiased`, the variance of the batch is first multiplied by $m / (m - 1)$,
    where $m$ is the number of values per channel on all devices that share statistics.

    The mean of complex inputs is complex. Their variance is the mean of
    $\lvert x - \mu \rvert^2$, which is real.

    Args:
        x: input, of any shape and floating dtype. Training needs rank 2 or more, unless
            each device of `axis_name` has one example.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        batch_stats: running statistics, float32 (float64 for float64 input), shape
            (features,).
        use_running_average: normalize by `batch_stats`, and leave them unchanged unless
            `update_stats` is True.
        axis: the feature axis or axes of `x`. The statistics are taken over all other
            axes.
        momentum: weight of the old statistics, in [0, 1]. PyTorch's momentum is the
            weight of the new statistics: 0.1 there is 0.9 here.
        epsilon: $\epsilon$, added to the variance; positive.
        unbiased: True keeps the running variance of the paper and of PyTorch, False
            that of Flax.
        update_stats: whether to update the statistics; None updates them in training
            only. False in training normalizes by the batch and returns `batch_stats`
            unchanged. True with `use_running_average` normalizes by the old statistics
            and returns the new ones.
        use_fast_variance: True takes the sums about `batch_stats.mean` where this saves
            a pass over `x` (on a TPU) or a collective (with `axis_name`, and under jit
            with sharded arrays). The relative error of the variance is then about
            $4 \cdot 10^{-7} (1 + d^2 / \sigma^2)$, where $d$ is the difference between
            the running mean and the mean of the batch: digits are lost only while $d$
            is still hundreds of standard deviations. False gives exact moments
            everywhere, at that cost.
        mask: which values count: booleans, or weights that count as repeats. The mask
            has the rank of `x`, and each dimension is 1 or that of `x`. All values are
            normalized. Masked values do not change the statistics, even if they are
            NaN. The mask is not differentiated. If the weights of a channel add up to 1
            or less, its running statistics stay unchanged.
        axis_name: axis or axes of an enclosing pmap, vmap or shard_map whose devices
            share statistics, with one collective in the forward pass and one in the
            backward pass. `batch_stats` must be equal on all these devices; if they
            differ, the new mean is NaN. Do not pass it under jit with sharded arrays:
            the statistics are those of the global batch without it.
        axis_index_groups: groups of indices of that axis that share statistics.
        activation: a name of jax.nn, such as "relu", or an elementwise function. It is
            applied in float32 (float64 for float64 input), and its derivative is
            recomputed from `x`. Outside jit, pass a function that was defined once:
            each new lambda is compiled again, and its compiled program stays in memory.
        residual: $r$, added before the activation; shape of `x`.
        dtype: dtype of the output; that of `x` if None. Sums are always float32 or
            float64.

    Returns:
        The output, of the shape of `x`, and the new BatchStats.

    Raises:
        TypeError: if an array has an integer dtype, if momentum or epsilon is not a
            number, or if a flag is a traced value.
        ValueError: if shapes do not fit, if there is one value per channel in training,
            if the activation is unknown, or if momentum or epsilon is out of range.
        NameError: if `axis_name` is not bound.
        NotImplementedError: if JAX does not support `axis_index_groups` in this
            context.

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
    _validate.check_flags(
        use_running_average=use_running_average,
        update_stats=update_stats,
        unbiased=unbiased,
        use_fast_variance=use_fast_variance,
    )
    _validate.check_momentum(momentum)
    if update_stats is None:
        update_stats = not use_running_average
    transform, operands = _prepare(
        x,
        scale,
        bias,
        batch_stats.mean,
        batch_stats.var,
        training=update_stats or not use_running_average,
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    origin = jnp.asarray(batch_stats.mean) if use_fast_variance else None
    if use_running_average:
        mean, var = jnp.asarray(batch_stats.mean), jnp.asarray(batch_stats.var)
        y = normalize_by(transform, operands, mean, var)
        batch = _moments(transform, operands, origin) if update_stats else None
    else:
        y, batch = _normalize_batch(transform, operands, origin)
    if batch is None or not update_stats:
        return y, batch_stats
    return y, update_batch_stats(
        batch_stats, batch, momentum=momentum, unbiased=unbiased
    )


def normalize_batch(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    origin: jax.Array | None = None,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    virtual_batch_size: int | None = None,
    dtype=None,
) -> tuple[jax.Array, Moments]:
    r"""Normalize by the moments of the batch, and return the moments too.

    $$
    y = f\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    where the mean $\mu$ and the biased variance $\sigma^2$ are the returned moments.
    `batch_norm` in training is this function followed by `update_batch_stats`.

    Args:
        x: input, as in `batch_norm`.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        origin: an estimate of the mean, such as the running mean, shape (features,);
            equal on all devices of `axis_name`. The sums are taken about it where this
            saves a pass over `x` or a collective, as with `use_fast_variance` in
            `batch_norm`. None gives exact moments.
        axis: the feature axis or axes of `x`. The statistics are taken over all other
            axes.
        epsilon: $\epsilon$, added to the variance; positive.
        mask: which values count, as in `batch_norm`.
        axis_name: axis or axes whose devices share statistics, as in `batch_norm`.
        axis_index_groups: groups of that axis, as in `batch_norm`.
        activation: $f$, as in `batch_norm`.
        residual: $r$, added before the activation; shape of `x`.
        virtual_batch_size: number of consecutive examples that are normalized together.
            It divides the first axis of `x`, which must not be a feature axis. None for
            all examples.
        dtype: dtype of the output; that of `x` if None.

    Returns:
        The output, of the shape of `x`, and the Moments of the batch. If devices share
        statistics, the moments are those of all these devices. With
        `virtual_batch_size`, the moments are those of each group, of shape (groups,
        features).

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `batch_norm`.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> x = jnp.array([[1.0, -4.0], [3.0, 4.0]])
        >>> y, batch = bnjax.normalize_batch(x)
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(batch.mean, batch.var, batch.count)
        [2. 0.] [ 1. 16.] [2. 2.]

    References:
        Ioffe & Szegedy (2015), Algorithm 1.
    """
    transform, operands = _prepare(
        x,
        scale,
        bias,
        training=True,
        origin=origin,
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        residual=residual,
        virtual_batch_size=virtual_batch_size,
        dtype=dtype,
    )
    if origin is not None:
        origin = jnp.asarray(origin)
        if transform.reduction.group_size is not None:
            groups = operands.x.shape[0] // transform.reduction.group_size
            origin = jnp.broadcast_to(origin, (groups, *origin.shape))
    return _normalize_batch(transform, operands, origin)


def _normalize_batch(
    transform: Transform, operands: Operands, origin: jax.Array | None
) -> tuple[jax.Array, Moments]:
    reduction, shape = transform.reduction, operands.x.shape
    if reduction.local_count(shape) * reduction.devices() < 2:
        raise ValueError(
            f"batch_norm: one value per channel in training: x has shape {shape} and "
            f"the statistics are over axes {reduction.axes}. Its output would be the "
            "bias whatever the input. Use a larger batch, share statistics with "
            "axis_name, or pass use_running_average=True."
        )
    if jnp.issubdtype(transform.compute_dtype, jnp.complexfloating):
        # Complex inputs are rare: JAX's own derivative is enough.
        batch = complex_moments(operands.x, operands.mask, reduction)
        return normalize_by(transform, operands, batch.mean, batch.var), batch
    x = checkpoint_name(operands.x, _INPUT_NAME)
    y, origin, centered = normalize_by_batch(
        transform, operands._replace(x=x), _known_origin(origin, transform)
    )
    return y, Moments(origin + centered.mean, centered.var, centered.count)


def _known_origin(origin: jax.Array | None, transform: Transform) -> jax.Array | None:
    if origin is None:
        return None
    # A running mean that is not finite must not make every later output NaN.
    origin = jnp.where(jnp.isfinite(origin), origin, 0)
    return lax.stop_gradient(origin.astype(transform.compute_dtype))


def moments(
    x: jax.Array,
    *,
    axis: Axes = -1,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    r"""Mean, biased variance and count of a batch, exact for any ratio of mean to std.

    $$
    \mu = \frac{\sum_i w_i x_i}{n}, \quad
    \sigma^2 = \frac{\sum_i w_i (x_i - \mu)^2}{n}, \quad n = \sum_i w_i
    $$

    with the weights $w_i$ of the mask, or 1. The sums are taken about a value close to
    the mean.

    Args:
        x: input, as in `batch_norm`.
        axis: the feature axis or axes of `x`. The statistics are taken over all other
            axes.
        mask: which values count, as in `batch_norm`.
        axis_name: axis or axes whose devices share statistics, as in `batch_norm`.
        axis_index_groups: groups of that axis, as in `batch_norm`.

    Returns:
        Moments in float32 (float64 for float64 input), of shape (features,). If no
        value counts, the mean, the variance and the count are 0.

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
    transform, operands = _prepare(
        x,
        training=True,
        axis=axis,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    return _moments(transform, operands, None)


def _moments(
    transform: Transform, operands: Operands, origin: jax.Array | None
) -> Moments:
    x, mask, reduction = operands.x, operands.mask, transform.reduction
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return complex_moments(x, mask, reduction)
    known, dtype = _known_origin(origin, transform), transform.compute_dtype
    origin, centered = checkpoint_named(
        moments_about_origin(x, mask, known, reduction, dtype)
    )
    return Moments(origin + centered.mean, centered.var, centered.count)


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
    r"""Normalize by given statistics: one affine map of each channel.

    $$
    y = f\left((x - \mu) \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    Args:
        x: input, of any shape and floating dtype.
        mean: $\mu$, shape (features,).
        var: $\sigma^2$, biased or unbiased, shape (features,).
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        axis: the feature axis or axes of `x`.
        epsilon: $\epsilon$, added to the variance; positive.
        mask: as in `batch_norm`. Masked values add no NaN to gradients.
        activation: $f$, as in `batch_norm`.
        residual: $r$, added before the activation; shape of `x`.
        dtype: dtype of the output; that of `x` if None.

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
    transform, operands = _prepare(
        x,
        scale,
        bias,
        mean,
        var,
        training=False,
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
    r"""Move running statistics towards those of a batch.

    $$
    \mu \leftarrow \rho \mu + (1 - \rho) \mu_B, \quad
    \sigma^2 \leftarrow \rho \sigma^2 + (1 - \rho) \frac{m}{m - 1} \sigma_B^2
    $$

    with `momentum` $\rho$ and the batch's mean $\mu_B$, biased variance $\sigma_B^2$
    and count $m$. The factor $m / (m - 1)$ is there only with `unbiased`. If $m \le 1$,
    the old statistics stay unchanged, because one value has no spread.

    Args:
        batch_stats: the old statistics, of shape (features,).
        batch: Moments of all the values of this update.
        momentum: weight of the old statistics, in [0, 1].
        unbiased: True keeps the variance of the paper and of PyTorch, False that of
            Flax.

    Returns:
        The new BatchStats, float64 if either argument is, else float32.

    Raises:
        ValueError: if the momentum is out of range or the shapes differ.

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
    _validate.check_momentum(momentum)
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
        dtype = _validate.promoted(old.dtype, new.dtype)
        old, new = old.astype(dtype), new.astype(dtype)
        # A momentum of 1 where a channel has too few values: its moments may be NaN.
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        keep = jnp.where(enough, jnp.asarray(momentum, dtype), one)
        take = jnp.where(enough, jnp.asarray(1 - momentum, dtype), zero)
        return keep * old + take * jnp.where(enough, new, zero)

    return BatchStats(moved(batch_stats.mean, batch.mean), moved(batch_stats.var, var))


def checkpoint_policy(*args, **params) -> bool:
    """Policy for `jax.checkpoint` that keeps the inputs and statistics of batch norm.

    In a network of convolutions, batch normalization and activations, the backward pass
    then keeps the outputs of the convolutions. It recomputes the activations from these
    outputs and from the statistics. No convolution and no collective is computed twice.
    The policy works with `jax.checkpoint`, `nn.remat` and `nnx.remat`.

    Args:
        *args: given by JAX.
        **params: given by JAX.

    Returns:
        Whether JAX keeps the value.

    Examples:
        >>> import jax, jax.numpy as jnp, bnjax
        >>> def loss(kernel, x):
        ...     y, _ = bnjax.normalize_batch(x @ kernel, activation="relu")
        ...     return jnp.sum(y**2)
        >>> loss = jax.checkpoint(loss, policy=bnjax.checkpoint_policy)
        >>> jax.grad(loss)(jnp.eye(3), jnp.arange(12.0).reshape(4, 3)).shape
        (3, 3)
    """
    return _save_named(*args, **params)


def _prepare(
    x,
    scale=None,
    bias=None,
    mean=None,
    var=None,
    *,
    training: bool,
    axis,
    origin=None,
    epsilon: float | jax.Array = 1e-5,
    mask=None,
    axis_name=None,
    axis_index_groups=None,
    activation=None,
    residual=None,
    virtual_batch_size=None,
    dtype=None,
) -> tuple[Transform, Operands]:
    """Check all arguments, and split them into static values and arrays."""
    x = _validate.as_input(x)
    dtype = _validate.as_dtype(dtype, x.dtype)
    features, reduction_axes = _validate.split_axes(x.shape, axis)
    if training:
        _validate.check_batch(x.shape, axis, reduction_axes, axis_name)
    feature_shape = tuple(x.shape[axis] for axis in features)
    _validate.check_epsilon(epsilon)
    arrays = {
        "scale": scale,
        "bias": bias,
        "mean": mean,
        "var": var,
        "origin": origin,
    }
    for name, value in arrays.items():
        _validate.check_features(value, name, feature_shape, x.shape)
    compute_dtype = _validate.promoted(x.dtype, jnp.float32, dtype)
    if axis_index_groups is not None:
        axis_index_groups = tuple(tuple(group) for group in axis_index_groups)
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    group_size = virtual_batch_size
    if group_size is not None:
        _validate.check_groups(group_size, x.shape, axis)
    transform = Transform(
        Reduction(reduction_axes, axis_name, axis_index_groups, group_size),
        _validate.as_activation(activation),
        dtype,
        compute_dtype,
    )
    mask = _validate.as_mask(mask, x.shape)
    if mask is not None and group_size is not None:
        mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
    operands = Operands(
        x=x,
        epsilon=jnp.asarray(epsilon, compute_dtype),
        mask=mask,
        scale=None if scale is None else _validate.as_input(scale, "scale"),
        bias=None if bias is None else _validate.as_input(bias, "bias"),
        residual=_validate.check_residual(residual, x.shape),
    )
    return transform, operands
