"""Ghost batch normalization: groups of the batch, each with statistics of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import bnjax.nnx
from bnjax import _validate, functional
from bnjax.functional import BatchStats, Moments
from bnjax.linen import BatchNorm

__all__ = ["GhostBatchNorm", "NnxGhostBatchNorm", "ghost_batch_norm"]

MOMENTS = "batch_moments"


def ghost_batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: BatchStats,
    *,
    virtual_batch_size: int | None,
    momentum: float | jax.Array = 0.99,
    unbiased: bool = True,
    use_fast_variance: bool = True,
    **options: Any,
) -> tuple[jax.Array, BatchStats]:
    r"""Normalize consecutive groups of the batch, each by its own mean and variance.

    With 256 examples and a virtual batch size of 32, examples 0 to 31 are normalized
    together, then examples 32 to 63, and so on, as on eight devices that share no
    statistics. The running statistics are updated once, by the moments of all groups
    merged by `bnjax.Moments.merge`. The function is for training. Inference has no
    groups: use `bnjax.batch_norm`.

    Args:
        x: input, of rank 2 or more, with the examples along its first axis.
        scale: $\gamma$, shape (features,); None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        batch_stats: running statistics, shape (features,).
        virtual_batch_size: number of examples in a group, a divisor of the batch; None
            for one group.
        momentum: weight of the old statistics, in [0, 1].
        unbiased: True gives the running variance the factor $m / (m - 1)$, where $m$ is
            the number of values per channel in all groups, on all devices that share
            statistics.
        use_fast_variance: as in `bnjax.batch_norm`.
        **options: `axis`, `epsilon`, `activation`, `residual`, `dtype`, `axis_name` and
            `axis_index_groups`, as in `bnjax.batch_norm`.

    Returns:
        The output, of the shape of `x`, and the new BatchStats.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            for a mask, and for a virtual batch size that does not divide the batch.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> from bnjax.variants.ghost import ghost_batch_norm
        >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
        >>> old, options = bnjax.BatchStats.init(1), {"virtual_batch_size": 2}
        >>> y, new = ghost_batch_norm(x, None, None, old, momentum=0.0, **options)
        >>> print(y.ravel().round(2), new.mean, new.var.round(2))
        [-1.  1. -1.  1.] [6.5] [43.67]

    References:
        Hoffer, Hubara & Soudry (2017), "Train longer, generalize better", Algorithm 1.
    """
    y, found = _normalize(
        x,
        scale,
        bias,
        virtual_batch_size=virtual_batch_size,
        origin=batch_stats.mean if use_fast_variance else None,
        **options,
    )
    return y, functional.update_batch_stats(
        batch_stats, merge_stacked(found), momentum=momentum, unbiased=unbiased
    )


def normalize_groups(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, **options: Any
) -> tuple[jax.Array, Moments]:
    """Return the output of `ghost_batch_norm` and the merged Moments of the groups.

    The count is that of this device only, also if `axis_name` shares a group between
    several devices: a merge of the devices' moments then counts each value once.
    """
    y, found = _normalize(x, scale, bias, **options)
    count = jnp.full_like(found.count, x.size // found.count.size)
    return y, merge_stacked(Moments(found.mean, found.var, count))


def _normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    virtual_batch_size: int | None,
    axis: _validate.Axes = -1,
    mask: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Moments]:
    """Return the output and the Moments of the groups, stacked along a leading axis."""
    _refuse_mask(mask)
    size = x.shape[0] if virtual_batch_size is None else virtual_batch_size
    _validate.check_groups(size, x.shape, axis)
    # One group is the plain layer, which has kernels for a CPU.
    groups = None if size == x.shape[0] else size
    y, found = functional.normalize_batch(
        x, scale, bias, axis=axis, virtual_batch_size=groups, **options
    )
    if groups is None:
        found = jax.tree.map(lambda leaf: leaf[None], found)
    return y, found


def merge_stacked(moments: Moments) -> Moments:
    """Merge moments that are stacked along a leading axis."""
    parts = range(moments.count.shape[0])
    if len(parts) == 1:
        return jax.tree.map(lambda leaf: leaf[0], moments)
    first, *rest = (jax.tree.map(lambda leaf, i=i: leaf[i], moments) for i in parts)
    return first.merge(*rest)


class GhostBatchNorm(BatchNorm):
    """`bnjax.linen.BatchNorm` that normalizes groups of the batch in training.

    Its variables and its inference are those of `bnjax.linen.BatchNorm`. If the
    collection "batch_moments" is mutable, the layer leaves the running statistics
    unchanged and writes the batch's moments to that collection. A training step over
    several batches or devices can then merge the moments and update the statistics
    once.

    Attributes:
        virtual_batch_size: number of examples in a group; divides the batch. None for
            one group.

    The other attributes are those of `bnjax.linen.BatchNorm`. A mask is refused in
    training.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.variants.ghost import GhostBatchNorm
        >>> layer = GhostBatchNorm(use_running_average=False, virtual_batch_size=2)
        >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> print(y.ravel().round(2))
        [-1.  1. -1.  1.]
    """

    virtual_batch_size: int | None = None

    @nn.nowrap
    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        if options["use_running_average"] or self.is_initializing():
            return super()._transform(x, scale, bias, batch_stats, **options)
        del options["use_running_average"]
        updating = options.pop("update_stats")
        options["virtual_batch_size"] = self.virtual_batch_size
        if not (updating and self.is_mutable_collection(MOMENTS)):
            return ghost_batch_norm(x, scale, bias, batch_stats, **options)
        del options["momentum"], options["unbiased"]
        origin = batch_stats.mean if options.pop("use_fast_variance") else None
        y, moments = normalize_groups(x, scale, bias, origin=origin, **options)
        self.put_variable(MOMENTS, "moments", moments)
        return y, batch_stats


class NnxGhostBatchNorm(bnjax.nnx.BatchNorm):
    """`bnjax.nnx.BatchNorm` that normalizes groups of the batch in training.

    Its variables and its inference are those of `bnjax.nnx.BatchNorm`.

    Args:
        num_features: number of channels.
        virtual_batch_size: number of examples in a group; divides the batch. None for
            one group.
        **kwargs: the arguments of `bnjax.nnx.BatchNorm`. A mask is refused in training.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.variants.ghost import NnxGhostBatchNorm
        >>> layer = NnxGhostBatchNorm(1, virtual_batch_size=2, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.array([[0.0], [2.0], [10.0], [14.0]])).ravel().round(2))
        [-1.  1. -1.  1.]
    """

    def __init__(
        self, num_features: int, *, virtual_batch_size: int | None = None, **kwargs
    ):
        super().__init__(num_features, **kwargs)
        self.virtual_batch_size = virtual_batch_size

    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        if options["use_running_average"]:
            return super()._transform(x, scale, bias, batch_stats, **options)
        del options["use_running_average"]
        del options["update_stats"]  # the layer keeps the statistics if it is False
        options["virtual_batch_size"] = self.virtual_batch_size
        return ghost_batch_norm(x, scale, bias, batch_stats, **options)


def _refuse_mask(mask: jax.Array | None) -> None:
    if mask is not None:
        raise ValueError(
            "batch_norm: a mask was given to ghost batch normalization in training; "
            "expected none. Remove the padding from the batch."
        )
