"""Test-time adaptation: statistics of the batch blended with those of training."""

import math
from typing import Any

import jax
from flax import linen as nn

import bnjax.linen
import bnjax.nnx
from bnjax import _validate, functional
from bnjax._moments import AxisName
from bnjax.functional import AxisIndexGroups, BatchStats

__all__ = ["AdaptiveBatchNorm", "NnxAdaptiveBatchNorm", "adaptive_batch_norm"]

# Options of the layers that `adaptive_batch_norm` does not have.
_OF_TRAINING = (
    "use_running_average",
    "momentum",
    "unbiased",
    "update_stats",
    "use_fast_variance",
)


def adaptive_batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: BatchStats,
    *,
    source_weight: float | jax.Array,
    axis: _validate.Axes = -1,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    **options: Any,
) -> tuple[jax.Array, BatchStats]:
    r"""Inference with running statistics that are blended with those of the batch.

    $$
    \mu = \frac{N}{N + n} \mu_s + \frac{n}{N + n} \mu_B, \quad
    \sigma^2 = \frac{N}{N + n} \sigma_s^2 + \frac{n}{N + n} \sigma_B^2
    $$

    with the running statistics $\mu_s, \sigma_s^2$ and the mean and biased variance
    $\mu_B, \sigma_B^2$ of a batch of $n$ examples. $N = 0$ is prediction-time batch
    normalization, which uses the batch alone. $N = \infty$ is `bnjax.batch_norm` in
    inference, and takes no statistics of the batch.

    The batch's moments are exact, and the gradient goes through them, so that scale and
    bias may be trained on the batch. A channel of one value keeps the running
    statistics.

    Args:
        x: input, of rank 2 or more, with the examples along its first axis.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        batch_stats: running statistics of training, shape (features,).
        source_weight: $N$, the number of examples that the running statistics count as;
            0 or more.
        axis: the feature axis or axes of `x`, not its first.
        mask: which values count, as in `bnjax.batch_norm`. $n$ is then the number of
            values that count, divided by the number of values of one example.
        axis_name: axis or axes whose devices adapt together, as in `bnjax.batch_norm`.
        axis_index_groups: groups of that axis, as in `bnjax.batch_norm`.
        **options: `epsilon`, `activation`, `residual` and `dtype`, as in
            `bnjax.batch_norm`.

    Returns:
        The output, and the BatchStats that normalized it. For the next batch, pass the
        statistics of training again; pass these only to continue from them.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            and for a source_weight that is not a number or is negative.

    Examples:
        >>> import bnjax, jax.numpy as jnp
        >>> from bnjax.variants.adaptation import adaptive_batch_norm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> source = bnjax.BatchStats.init(1)
        >>> y, blended = adaptive_batch_norm(x, None, None, source, source_weight=2)
        >>> print(blended.mean, blended.var, y.ravel())
        [1.] [1.] [0.      1.99999]

    References:
        Schneider et al. (2020), "Improving robustness against common corruptions by
        covariate shift adaptation", section 3; Nado et al. (2020), "Evaluating
        prediction-time batch normalization for robustness under covariate shift".
    """
    _validate.check_number(
        source_weight,
        "source_weight",
        lambda weight: weight >= 0,
        "0 or more, the number of examples that the running statistics count as; inf "
        "for these statistics alone",
    )
    x = _validate.as_input(x)
    features, reduction = _validate.split_axes(x.shape, axis)
    if 0 not in reduction:
        raise ValueError(
            f"batch_norm: axis={axis!r} makes the first axis of x a feature axis; "
            "expected the examples along it, to be counted."
        )
    stats = batch_stats
    if isinstance(source_weight, jax.Array) or source_weight < math.inf:
        found = functional.moments(
            x,
            axis=features,
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        examples = found.count / math.prod(x.shape[axis] for axis in reduction[1:])
        stats = functional.update_batch_stats(
            batch_stats,
            found,
            momentum=1 - examples / (source_weight + examples),
            unbiased=False,
        )
    y = functional.normalize(
        x, stats.mean, stats.var, scale, bias, axis=features, mask=mask, **options
    )
    return y, stats


class AdaptiveBatchNorm(bnjax.linen.BatchNorm):
    """`bnjax.linen.BatchNorm` that adapts to each batch in inference.

    Its variables and its training are those of `bnjax.linen.BatchNorm`. In inference
    the running statistics do not change: `adaptive_batch_norm` blends each batch with
    them, and the next batch starts from them again. To adapt a network that was trained
    with the plain layer, put this layer in its place.

    Attributes:
        source_weight: the number of examples that the running statistics count as: inf
            for the plain layer, 0 for the batch alone.

    The other attributes are those of `bnjax.linen.BatchNorm`. `axis_name` also shares
    the batch's statistics in inference.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.adaptation import AdaptiveBatchNorm
        >>> layer = AdaptiveBatchNorm(use_running_average=True, source_weight=2)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> print(layer.apply(variables, x).ravel())
        [0.      1.99999]
    """

    source_weight: float | jax.Array = math.inf

    @nn.nowrap
    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        if self.is_initializing() or not options["use_running_average"]:
            return super()._transform(x, scale, bias, batch_stats, **options)
        return _infer(x, scale, bias, batch_stats, self.source_weight, options)


class NnxAdaptiveBatchNorm(bnjax.nnx.BatchNorm):
    """`bnjax.nnx.BatchNorm` that adapts to each batch in inference.

    Its variables and its training are those of `bnjax.nnx.BatchNorm`. In inference the
    running statistics do not change: `adaptive_batch_norm` blends each batch with them,
    and the next batch starts from them again.

    Args:
        num_features: number of channels.
        source_weight: the number of examples that the running statistics count as: inf
            for the plain layer, 0 for the batch alone.
        **kwargs: the arguments of `bnjax.nnx.BatchNorm`. `axis_name` also shares the
            batch's statistics in inference.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.variants.adaptation import NnxAdaptiveBatchNorm
        >>> layer = NnxAdaptiveBatchNorm(1, source_weight=2, rngs=nnx.Rngs(0))
        >>> layer.eval()
        >>> print(layer(jnp.array([[1.0], [3.0]])).ravel())
        [0.      1.99999]
    """

    def __init__(
        self,
        num_features: int,
        *,
        source_weight: float = math.inf,
        **kwargs: Any,
    ):
        super().__init__(num_features, **kwargs)
        self.source_weight = source_weight

    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        if not options["use_running_average"]:
            return super()._transform(x, scale, bias, batch_stats, **options)
        return _infer(x, scale, bias, batch_stats, self.source_weight, options)


def _infer(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: BatchStats,
    source_weight: float | jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, BatchStats]:
    """The output of a layer in inference, and its unchanged running statistics."""
    if options["update_stats"]:
        raise ValueError(
            "batch_norm: update_stats=True in inference; expected None or False. This "
            "layer blends the batch with the running statistics for the output only, "
            "and keeps those of training."
        )
    options = {name: o for name, o in options.items() if name not in _OF_TRAINING}
    y, _ = adaptive_batch_norm(
        x, scale, bias, batch_stats, source_weight=source_weight, **options
    )
    return y, batch_stats
