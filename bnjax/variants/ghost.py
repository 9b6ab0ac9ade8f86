"""Ghost batch normalization: the batch in groups, each with statistics of its own."""

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
    """Normalize consecutive groups of the batch, each by its own mean and variance.

    With 256 examples and a virtual batch size of 32, examples 0 to 31 are normalized
    together, 32 to 63, and so on, as eight devices would that share no statistics. The
    running statistics move once, towards the moments of all groups joined by
    `Moments.merge`. It is for training: inference has no groups, see
    `bnjax.batch_norm`.

    `x` is of rank 2 or more, the examples along its first axis; `virtual_batch_size` is
    the number of examples in a group, which divides the batch, or None for one group.
    With `unbiased` the running variance has the factor m / (m - 1), m being the values
    in all groups. The others are those of `bnjax.batch_norm`, of which `axis`,
    `epsilon`, `activation`, `residual`, `dtype`, `axis_name` and `axis_index_groups`
    are the options.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
        >>> old, options = bnjax.BatchStats.init(1), {"virtual_batch_size": 2}
        >>> y, new = ghost_batch_norm(x, None, None, old, momentum=0.0, **options)
        >>> print(y.ravel().round(2), new.mean, new.var.round(2))
        [-1.  1. -1.  1.] [6.5] [43.67]

    References:
        Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", Algorithm 1.
    """
    y, moments = normalize_groups(
        x,
        scale,
        bias,
        virtual_batch_size=virtual_batch_size,
        origin=batch_stats.mean if use_fast_variance else None,
        **options,
    )
    return y, functional.update_batch_stats(
        batch_stats, moments, momentum=momentum, unbiased=unbiased
    )


def normalize_groups(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    virtual_batch_size: int | None,
    axis: _validate.Axes = -1,
    **options: Any,
) -> tuple[jax.Array, Moments]:
    """Return the output of `ghost_batch_norm` and the joined Moments of the groups.

    Their count is that of this device alone, also where `axis_name` shares a group
    between several: merging the devices' moments counts every value once.
    """
    size = x.shape[0] if virtual_batch_size is None else virtual_batch_size
    _validate.check_groups(size, x.shape, axis)
    # One group is the plain layer, with its kernels on a CPU.
    groups = None if size == x.shape[0] else size
    y, found = functional.normalize_batch(
        x, scale, bias, axis=axis, virtual_batch_size=groups, **options
    )
    count = jnp.full_like(found.count, x.size // found.count.size)
    found = Moments(found.mean, found.var, count)
    return y, found if groups is None else merge_stacked(found)


def merge_stacked(moments: Moments) -> Moments:
    """Join moments that are stacked along a leading axis."""
    parts = range(moments.count.shape[0])
    first, *rest = (jax.tree.map(lambda leaf, i=i: leaf[i], moments) for i in parts)
    return first.merge(*rest)


class GhostBatchNorm(BatchNorm):
    """`bnjax.linen.BatchNorm` that normalizes by groups of the batch in training.

    Its variables, and what it does in inference, are those of the layer it extends.
    Where the collection "batch_moments" is mutable, it leaves the running statistics as
    they are and writes the batch's moments there: whoever takes a step over several
    batches or devices merges them and updates once.

    Attributes:
        virtual_batch_size: examples in a group; divides the batch. None for one group.

    The other attributes are those of `bnjax.linen.BatchNorm`; a mask is refused in
    training.
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
        moving = {name: options.pop(name) for name in ("momentum", "unbiased")}
        _refuse_mask(options.pop("mask"))
        fast = options.pop("use_fast_variance")
        options["virtual_batch_size"] = self.virtual_batch_size
        origin = batch_stats.mean if fast else None
        y, moments = normalize_groups(x, scale, bias, origin=origin, **options)
        if not updating:
            return y, batch_stats
        if self.is_mutable_collection(MOMENTS):
            self.put_variable(MOMENTS, "moments", moments)
            return y, batch_stats
        return y, functional.update_batch_stats(batch_stats, moments, **moving)


class NnxGhostBatchNorm(bnjax.nnx.BatchNorm):
    """`bnjax.nnx.BatchNorm` that normalizes by groups of the batch in training.

    Its variables, and what it does in inference, are those of the layer it extends.

    Args:
        num_features: number of channels.
        virtual_batch_size: examples in a group; divides the batch. None for one group.
        **kwargs: those of `bnjax.nnx.BatchNorm`; a mask is refused in training.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
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
        updating = options.pop("update_stats")
        _refuse_mask(options.pop("mask"))
        options["virtual_batch_size"] = self.virtual_batch_size
        y, new = ghost_batch_norm(x, scale, bias, batch_stats, **options)
        return y, new if updating else batch_stats


def _refuse_mask(mask: jax.Array | None) -> None:
    if mask is not None:
        raise ValueError(
            "batch_norm: a mask was given to groups of a virtual batch size; "
            "expected none. Leave the padding out of the batch."
        )
