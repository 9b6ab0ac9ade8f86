"""Whitening batch normalization as pure functions."""

import functools

import jax
import jax.numpy as jnp

from bnjax import _validate, functional
from bnjax._moments import AxisName, Reduction, mask_to_bool
from bnjax._validate import Activation
from bnjax.functional import AxisIndexGroups
from bnjax.variants.whitening.covariance import (
    ChannelGroups,
    WhiteningMoments,
    WhiteningStats,
    batch_moments,
    update_whitening_stats,
)
from bnjax.variants.whitening.inverse_sqrt import einsum, matmul, whitening_matrix


def whitening_batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: WhiteningStats,
    *,
    group_size: int | None,
    iterations: int | None = 5,
    use_running_average: bool = False,
    axis: int = -1,
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
) -> tuple[jax.Array, WhiteningStats]:
    r"""Whitening of groups of channels, in training or in inference.

    $$
    y = f\left(\gamma \odot W (x - \mu) + \beta + r\right), \quad
    W = (\Sigma + \epsilon I)^{-1/2}
    $$

    for each group of consecutive channels (see `whitening_matrix`), with the activation
    $f$ and the residual $r$. In training, the mean $\mu$ and the biased covariance
    $\Sigma$ are those of the batch. With `use_running_average`, they are the running
    statistics. With one channel per group this is batch normalization.

    Args:
        x: input, as in `bnjax.batch_norm`, of real dtype.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        batch_stats: running statistics.
        group_size: number of channels whitened together, a divisor of the features;
            None for all of them. The covariance of a batch with fewer values than that
            is singular.
        iterations: steps of Newton's method (IterNorm); None for ZCA by an
            eigendecomposition.
        use_running_average: whiten by `batch_stats`.
        axis: the feature axis of `x`. The statistics are taken over all other axes.
        momentum: weight of the old statistics, in [0, 1].
        epsilon: $\epsilon$, added to the diagonal of the covariance; positive.
        unbiased: True gives the running covariance the factor $m / (m - 1)$.
        update_stats: whether to update `batch_stats`; None updates them in training
            only. True with `use_running_average` whitens by the old statistics and
            updates them.
        use_fast_variance: with `axis_name`, True merges the devices' statistics about
            the running mean, in one collective. Digits are lost only while the running
            mean is hundreds of standard deviations away from the mean of the batch.
            False is exact, and needs a second collective.
        mask: which values count, as in `bnjax.batch_norm`; of size 1 along `axis`,
            because a covariance needs all channels of a value.
        axis_name: axis or axes whose devices share statistics. One collective in the
            forward pass and one in the backward pass exchange at most features *
            (group_size + 3) numbers each.
        axis_index_groups: groups of that axis, as in `bnjax.batch_norm`.
        activation: $f$, as in `bnjax.batch_norm`.
        residual: $r$, added before the activation; shape of `x`.
        dtype: dtype of the output; that of `x` if None. Statistics are float32 or
            float64.

    Returns:
        The output, of the shape of `x`, and the new WhiteningStats.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.variants.whitening import WhiteningStats, whitening_batch_norm
        >>> x = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.array(
        ...     [[2.0, 1.0], [0.0, 1.0]]
        ... )
        >>> stats = WhiteningStats.init(2, group_size=2)
        >>> y, stats = whitening_batch_norm(x, None, None, stats, group_size=2)
        >>> print(jnp.abs(jnp.cov(y.T, bias=True)).round(2))
        [[1. 0.]
         [0. 1.]]

    References:
        Huang et al. (2018), "Decorrelated Batch Normalization"; Huang et al. (2019),
        "Iterative Normalization: Beyond Standardization towards Efficient Whitening";
        Ioffe & Szegedy (2015), section 2, for the cost that their paper avoids.
    """
    _validate.check_flags(
        use_running_average=use_running_average,
        update_stats=update_stats,
        unbiased=unbiased,
        use_fast_variance=use_fast_variance,
    )
    _validate.check_momentum(momentum)
    x, groups, dtype = _prepare(x, axis, group_size, mask, scale, bias, dtype)
    options = {"activation": activation, "residual": residual, "dtype": dtype}
    options |= {"mask": mask, "epsilon": epsilon}
    _check_stats(batch_stats, groups, x.shape)
    if update_stats is None:
        update_stats = not use_running_average
    sharing = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    origin = batch_stats.mean if use_fast_variance else None
    if use_running_average:
        compute_dtype = _validate.promoted(x.dtype, jnp.float32, dtype)
        center = groups.grouped(jnp.asarray(batch_stats.mean, compute_dtype))
        cov = jnp.asarray(batch_stats.cov, compute_dtype)
        mean = jnp.zeros_like(center)
        y = _whiten(
            x, center, mean, cov, scale, bias, groups, iterations=iterations, **options
        )
        if not update_stats:
            return y, batch_stats
        *_, batch = batch_moments(
            x,
            _validate.as_mask(mask, x.shape),
            origin,
            groups,
            _reduction(groups, **sharing),
            compute_dtype,
        )
    else:
        y, batch = whiten_batch(
            x,
            scale,
            bias,
            group_size=group_size,
            iterations=iterations,
            origin=origin,
            axis=axis,
            **sharing,
            **options,
        )
    if not update_stats:
        return y, batch_stats
    return y, update_whitening_stats(
        batch_stats, batch, momentum=momentum, unbiased=unbiased
    )


def whiten_batch(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    group_size: int | None,
    iterations: int | None = 5,
    origin: jax.Array | None = None,
    axis: int = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype=None,
) -> tuple[jax.Array, WhiteningMoments]:
    r"""Whiten by the moments of the batch, and return the moments too.

    `whitening_batch_norm` in training is this function followed by
    `update_whitening_stats`.

    Args:
        x: input, as in `bnjax.batch_norm`, of real dtype.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        group_size: number of channels whitened together; None for all of them.
        iterations: steps of Newton's method; None for ZCA.
        origin: used with `axis_name`: an estimate of the mean, such as the running
            mean, shape (features,), equal on all devices. None for exact moments by a
            second collective.
        axis: the feature axis of `x`.
        epsilon: added to the diagonal of the covariance; positive.
        mask: which values count, as in `whitening_batch_norm`.
        axis_name: axis or axes whose devices share statistics.
        axis_index_groups: groups of that axis.
        activation: as in `bnjax.batch_norm`.
        residual: added before the activation; shape of `x`.
        dtype: dtype of the output; that of `x` if None.

    Returns:
        The output, of the shape of `x`, and the WhiteningMoments of the batch. If
        devices share statistics, the moments are those of all these devices.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.whitening import whiten_batch
        >>> x = jnp.array([[0.0, 0.0], [0.0, 4.0], [2.0, 4.0], [2.0, 8.0]])
        >>> y, batch = whiten_batch(x, group_size=2, iterations=None)
        >>> print(batch.mean, batch.cov)
        [1. 4.] [[[1. 2.]
          [2. 8.]]]
        >>> print((y.T @ y / 4).round(3))
        [[1. 0.]
         [0. 1.]]
    """
    x, groups, dtype = _prepare(x, axis, group_size, mask, scale, bias, dtype)
    _validate.check_features(origin, "origin", (x.shape[groups.axis],), x.shape)
    reduction = _reduction(groups, axis_name, axis_index_groups)
    values = x.size // x.shape[groups.axis]
    if values * reduction.devices() < 2:
        raise ValueError(
            f"batch_norm: one value per channel in training: x has shape {x.shape}. "
            "Its output would be the bias whatever the input. Use a larger batch, "
            "share statistics with axis_name, or pass use_running_average=True."
        )
    compute_dtype = _validate.promoted(x.dtype, jnp.float32, dtype)
    center, mean, moments = batch_moments(
        x, _validate.as_mask(mask, x.shape), origin, groups, reduction, compute_dtype
    )
    y = _whiten(
        x,
        center,
        mean,
        moments.cov,
        scale,
        bias,
        groups,
        iterations=iterations,
        epsilon=epsilon,
        mask=mask,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    return y, moments


def whitening_affine(
    batch_stats: WhiteningStats,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    iterations: int | None = 5,
    epsilon: float | jax.Array = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    r"""Return the kernel and the offset of `whitening_batch_norm` in inference.

    $y = x K + b$ with a block-diagonal kernel $K$ and an offset $b$. It folds into a
    linear layer before it, whose kernel becomes `its_kernel @ kernel` and whose bias
    becomes `its_bias @ kernel + offset`.

    Args:
        batch_stats: running statistics.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        iterations: steps of Newton's method; None for ZCA.
        epsilon: added to the diagonal of the covariance; positive.

    Returns:
        The kernel, of shape (features, features), and the offset, of shape (features,).

    Raises:
        TypeError, ValueError: as `whitening_matrix`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.whitening import WhiteningStats, whitening_affine
        >>> stats = WhiteningStats(jnp.ones(2), jnp.array([[[2.5, 1.5], [1.5, 2.5]]]))
        >>> kernel, offset = whitening_affine(stats, iterations=None)
        >>> print(kernel.round(2), offset.round(2))
        [[ 0.75 -0.25]
         [-0.25  0.75]] [-0.5 -0.5]
    """
    matrix = whitening_matrix(batch_stats.cov, iterations=iterations, epsilon=epsilon)
    kernel = jax.scipy.linalg.block_diag(*matrix)
    offset = -matmul(batch_stats.mean, kernel)
    if scale is not None:
        kernel, offset = kernel * scale, offset * scale
    return kernel, offset if bias is None else offset + bias


def _prepare(x, axis, group_size, mask, scale, bias, dtype):
    """Check what `functional.moments` and `functional.normalize` do not check."""
    x = _validate.as_input(x)
    dtype = _validate.as_dtype(dtype, x.dtype)
    for each, name in ((x.dtype, "x"), (dtype, "the output")):
        if jnp.issubdtype(each, jnp.complexfloating):
            raise TypeError(
                f"batch_norm: {name} has dtype {each.name}; expected a real dtype: "
                "whitening is for real numbers."
            )
    groups = ChannelGroups.of(x.shape, axis, group_size)
    features = (x.shape[groups.axis],)
    for value, name in ((scale, "scale"), (bias, "bias")):
        _validate.check_features(value, name, features, x.shape)
    mask = _validate.as_mask(mask, x.shape)
    if mask is not None and mask.shape[groups.axis] != 1:
        raise ValueError(
            f"batch_norm: mask has shape {mask.shape}; expected 1 along the feature "
            f"axis {groups.axis}: a covariance needs all channels of a value."
        )
    return x, groups, dtype


def _reduction(groups, axis_name, axis_index_groups):
    if axis_index_groups is not None:
        axis_index_groups = tuple(tuple(group) for group in axis_index_groups)
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    return Reduction(groups.rows, axis_name, axis_index_groups)


def _check_stats(batch_stats, groups, shape):
    _validate.check_features(
        batch_stats.mean, "mean", (groups.number * groups.size,), shape
    )
    expected = (groups.number, groups.size, groups.size)
    if jnp.shape(batch_stats.cov) != expected:
        raise ValueError(
            f"batch_norm: cov has shape {jnp.shape(batch_stats.cov)}; expected "
            f"{expected}, (groups, group_size, group_size). Check `group_size`."
        )


def _whiten(
    x,
    center,
    mean,
    cov,
    scale,
    bias,
    groups,
    *,
    iterations,
    epsilon,
    mask,
    residual,
    **options,
):
    """Return scale * W (x - center - mean) + bias, then residual and activation."""
    matrix = whitening_matrix(cov, iterations=iterations, epsilon=epsilon)
    if scale is not None:
        matrix = groups.grouped(scale.astype(matrix.dtype))[..., None] * matrix
    rows, mask = groups.subscripts, _validate.as_mask(mask, x.shape)

    # Recomputed from `x` in the derivative: no centered or whitened copy is kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def affine(x, center, matrix, mean, bias, residual):
        expand = Reduction(groups.rows).expand
        # Two subtractions, because center + mean would be rounded if the mean is large.
        centered = groups.split(x).astype(matrix.dtype) - expand(center)
        centered = centered - expand(mean)
        if mask is not None:
            hidden = ~mask_to_bool(groups.split(mask))
            lost = hidden & ~jnp.isfinite(jnp.square(centered))
            centered = jnp.where(lost, 0, centered)
        z = einsum(f"gij,{rows('j')}->{rows('i')}", matrix, centered)
        # z has mean 0 and variance 1 already: bias, residual, activation and dtype are
        # left to apply.
        zeros = jnp.zeros(x.shape[groups.axis], z.dtype)
        return functional.normalize(
            groups.join(z),
            zeros,
            zeros + 1,
            None,
            bias,
            axis=groups.axis,
            epsilon=float(jnp.finfo(z.dtype).tiny),
            mask=mask,
            residual=residual,
            **options,
        )

    return affine(x, center, matrix, mean, bias, residual)
