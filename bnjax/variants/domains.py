"""Running statistics for each of several domains, to which the examples belong."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import bnjax.linen
import bnjax.nnx
from bnjax import _validate, functional
from bnjax.functional import BatchStats, Moments

__all__ = [
    "DomainBatchNorm",
    "NnxDomainBatchNorm",
    "domain_batch_norm",
    "domain_moments",
]


def domain_batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: BatchStats,
    domain: int | jax.Array,
    *,
    use_running_average: bool = False,
    axis: _validate.Axes = -1,
    momentum: float | jax.Array = 0.99,
    unbiased: bool = True,
    update_stats: bool | None = None,
    use_fast_variance: bool = True,
    mask: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, BatchStats]:
    r"""`bnjax.batch_norm` with the running statistics of one of several domains.

    The examples of a domain are normalized together, apart from those of other domains,
    and update the statistics of their domain only. With one domain this is
    `bnjax.batch_norm`.

    The index may be a traced value: one program serves all domains. One index for the
    whole batch costs as much as `bnjax.batch_norm`. One index per example takes the
    exact moments of all domains, in one collective if devices share them.

    Args:
        x: input.
        scale: $\gamma$, shape (features,) for all domains or (domains, features); None
            for ones.
        bias: $\beta$, likewise; None for zeros.
        batch_stats: running statistics, shape (domains, features).
        domain: index of the domain, an integer in [0, domains); or one index for each
            example, of shape (batch,), along the first axis of `x`.
        use_running_average: normalize by `batch_stats`.
        axis: the feature axis or axes of `x`. With one index per example, it must not
            be the first axis.
        momentum: weight of the old statistics, in [0, 1].
        unbiased: True keeps the running variance of the paper and of PyTorch, False
            that of Flax.
        update_stats: whether to update `batch_stats`, as in `bnjax.batch_norm`.
        use_fast_variance: as in `bnjax.batch_norm`, for one index per batch.
        mask: which values count, as in `bnjax.batch_norm`.
        **options: all other arguments of `bnjax.batch_norm`. With `axis_name`, one
            index for the batch must be the same on all devices.

    Returns:
        The output, and the new BatchStats of all domains. If a traced index is out of
        range, the output is NaN, and the statistics stay unchanged. In a batch of
        several domains, a domain with a single value per channel has its bias as
        output, and keeps its statistics.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            and for an index that is not an integer, is out of range, or has another
            shape.

    Examples:
        >>> import bnjax, jax.numpy as jnp
        >>> from bnjax.variants.domains import domain_batch_norm
        >>> x = jnp.array([[1.0], [3.0], [40.0], [60.0]])
        >>> old = bnjax.BatchStats.init((2, 1))
        >>> _, new = domain_batch_norm(x[2:], None, None, old, 1, momentum=0.5)
        >>> print(new.mean.ravel(), new.var.ravel())
        [ 0. 25.] [  1.  100.5]
        >>> y, _ = domain_batch_norm(x, None, None, old, jnp.array([0, 0, 1, 1]))
        >>> print(y.ravel().round(3))
        [-1.  1. -1.  1.]

    References:
        Xie et al. (2020), "Adversarial examples improve image recognition", section
        3.1 (AdvProp); Chang et al. (2019), "Domain-specific batch normalization for
        unsupervised domain adaptation".
    """
    x = _validate.as_input(x)
    features, _ = _validate.split_axes(x.shape, axis)
    shape = tuple(x.shape[axis] for axis in features)
    domains = _check_shapes(batch_stats, scale, bias, shape)
    index: Any = _as_domain(domain, domains, x.shape, features)
    flags = {
        "use_running_average": use_running_average,
        "unbiased": unbiased,
        "use_fast_variance": use_fast_variance,
    }
    _validate.check_flags(**flags, update_stats=update_stats)
    if update_stats is None:
        update_stats = not use_running_average
    _validate.check_momentum(momentum)
    options |= {"axis": features, "mask": mask}
    own = _one_hot(index, domains, len(shape))

    def of_domain(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or jnp.ndim(leaf) == len(shape):
            return leaf
        # As a sum: its transpose is a sum too, and XLA can shard it by examples.
        rows = jnp.expand_dims(leaf, tuple(range(index.ndim)))
        total = jnp.where(own, rows, jnp.zeros_like(rows)).sum(index.ndim)
        # Not the statistics of another domain where the index is out of range.
        return jnp.where(own.any(index.ndim), total, jnp.nan)

    if index.ndim:
        shared = {o: options.pop(o, None) for o in ("axis_name", "axis_index_groups")}
        batch = None
        if update_stats or not use_running_average:
            given = {"domains": domains, "axis": features, "mask": mask}
            batch = domain_moments(x, index, **given, **shared)
        stats: Any = batch_stats if use_running_average else batch
        arrays = [of_domain(leaf) for leaf in (stats.mean, stats.var, scale, bias)]
        y = _normalize_each(x, arrays, **options)
        if batch is None or not update_stats:
            return y, batch_stats
        return y, functional.update_batch_stats(
            batch_stats, batch, momentum=momentum, unbiased=unbiased
        )
    if isinstance(index, jax.core.Tracer):
        epsilon = options.get("epsilon", 1e-5)
        _validate.check_epsilon(epsilon)
        options["epsilon"] = jnp.where(own.any(), epsilon, jnp.nan)
    stats = jax.tree.map(of_domain, batch_stats)
    scale, bias = of_domain(scale), of_domain(bias)
    options |= flags | {"momentum": momentum, "update_stats": update_stats}
    y, new = functional.batch_norm(x, scale, bias, stats, **options)
    if not update_stats:
        return y, batch_stats
    return y, jax.tree.map(lambda a, b: jnp.where(own, b[None], a), batch_stats, new)


def _one_hot(domain: Any, domains: int, features: int) -> jax.Array:
    """Whether it is that domain, shape (..., domains, 1, ..., 1), for the features."""
    known = np.arange(domains).reshape(*(1,) * domain.ndim, domains)
    own = jnp.expand_dims(domain, -1) == known
    return jnp.expand_dims(own, tuple(range(own.ndim, own.ndim + features)))


def domain_moments(
    x: jax.Array,
    domain: int | jax.Array,
    *,
    domains: int,
    axis: _validate.Axes = -1,
    mask: jax.Array | None = None,
    **shared: Any,
) -> Moments:
    """`bnjax.moments` of each domain's examples in a batch.

    Args:
        x: input.
        domain: index of the domain or indices, as in `domain_batch_norm`.
        domains: number of domains.
        axis: the feature axis or axes of `x`.
        mask: which values count, as in `bnjax.moments`.
        **shared: `axis_name` and `axis_index_groups`, as in `bnjax.moments`.

    Returns:
        Moments of shape (domains, features). A domain without examples has count 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.domains import domain_moments
        >>> x = jnp.array([[1.0], [40.0], [3.0]])
        >>> found = domain_moments(x, jnp.array([0, 1, 0]), domains=3)
        >>> print(found.mean.ravel(), found.count.ravel())
        [ 2. 40.  0.] [2. 1. 0.]
    """
    x = _validate.as_input(x)
    features, _ = _validate.split_axes(x.shape, axis)
    index: Any = _as_domain(domain, domains, x.shape, features)
    mask = _validate.as_mask(mask, x.shape)

    def of_one(own: jax.Array) -> Moments:
        own = own if mask is None else jnp.where(own, mask, jnp.zeros_like(mask))
        return functional.moments(x, axis=features, mask=own, **shared)

    if index.ndim:
        return jax.vmap(of_one, 1)(_one_hot(index, domains, x.ndim - 1))
    found = functional.moments(x, axis=features, mask=mask, **shared)
    own = _one_hot(index, domains, len(features))
    rows = jax.tree.map(lambda leaf: leaf[None], found)
    return jax.tree.map(lambda leaf: jnp.where(own, leaf, jnp.zeros_like(leaf)), rows)


def _normalize_each(
    x: jax.Array,
    per_example: list[jax.Array | None],
    *,
    axis: tuple[int, ...],
    mask: jax.Array | None,
    residual: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Normalize each example by its own mean, var, scale and bias, or shared ones."""
    mask = _validate.as_mask(mask, x.shape)
    residual = _validate.check_residual(residual, x.shape)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))

    def one(x, per_example, mask, residual):
        arrays: Any = {"mask": mask, "residual": residual}
        inner = tuple(feature - 1 for feature in axis)
        return functional.normalize(x, *per_example, axis=inner, **arrays, **options)

    stacked = [a is not None and jnp.ndim(a) > len(axis) for a in per_example]
    along = [0 if each else None for each in stacked]
    return jax.vmap(one, (0, along, 0, 0))(x, per_example, mask, residual)


def _check_shapes(
    batch_stats: BatchStats, scale: Any, bias: Any, features: tuple[int, ...]
) -> int:
    """The number of domains, or an error if the shapes of the arrays do not fit."""
    domains = (jnp.shape(batch_stats.mean) or (0,))[0]
    stacked = (domains, *features)
    for name, value, shapes in (
        ("batch_stats.mean", batch_stats.mean, [stacked]),
        ("batch_stats.var", batch_stats.var, [stacked]),
        ("scale", scale, [stacked, features]),
        ("bias", bias, [stacked, features]),
    ):
        if value is not None and jnp.shape(value) not in shapes:
            expected = f"(domains, {', '.join(map(str, features))})"
            shared = f" or {features}" if len(shapes) > 1 else ""
            raise ValueError(
                f"batch_norm: {name} has shape {jnp.shape(value)}; expected {expected}"
                f"{shared}. BatchStats.init({expected}) starts the statistics."
            )
    return domains


def _as_domain(
    domain: Any, domains: int, shape: tuple[int, ...], features: tuple[int, ...]
) -> Any:
    """The index or indices as an array; a NumPy array, and checked, if it is known."""
    if not isinstance(domain, jax.core.Tracer):
        domain = np.asarray(domain)
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise TypeError(
            f"batch_norm: domain has dtype {domain.dtype}; expected integers, indices "
            f"of domains from 0 to {domains - 1}."
        )
    if domain.shape not in ((), shape[:1]) or (domain.ndim and 0 in features):
        raise ValueError(
            f"batch_norm: domain has shape {domain.shape} for x of shape {shape} with "
            f"feature axes {features}; expected (), one index for the batch, or "
            "(batch,), one for each example along the first axis."
        )
    known = isinstance(domain, np.ndarray)
    if known and not np.all((domain >= 0) & (domain < domains)):
        raise ValueError(
            f"batch_norm: domain={domain} is out of range; expected 0 to {domains - 1}."
        )
    return domain


class _Domains:
    """The common part of the layers of linen and nnx."""

    domains: int

    @nn.nowrap
    def moments_of(
        self, x: jax.Array, domain: int | jax.Array | None = None, **options: Any
    ) -> Moments:
        """The moments of a batch for `bnjax.population`, as in `domain_moments`."""
        domain = self._given(domain)
        return domain_moments(x, domain, domains=self.domains, **options)

    @nn.nowrap
    def _transform(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        batch_stats: BatchStats,
        **options: Any,
    ) -> tuple[jax.Array, BatchStats]:
        domain = self._given(options.pop("domain"))
        return domain_batch_norm(x, scale, bias, batch_stats, domain, **options)

    @nn.nowrap
    def _given(self, domain: int | jax.Array | None) -> int | jax.Array:
        if domain is None and self.domains != 1:
            raise ValueError(
                f"batch_norm: domain is None for a layer of {self.domains} domains; "
                "expected layer(x, domain=...), one index for the batch or one for "
                "each example."
            )
        return 0 if domain is None else domain


class DomainBatchNorm(_Domains, bnjax.linen.BatchNorm):
    """`bnjax.linen.BatchNorm` with running statistics for each of several domains.

    "mean" and "var" have shape (domains, features), and so have "scale" and "bias"
    unless all domains share them.

    Attributes:
        domains: number of domains.
        share_affine: one scale and bias for all domains.

    The other attributes are those of `bnjax.linen.BatchNorm`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.domains import DomainBatchNorm
        >>> layer = DomainBatchNorm(domains=2, use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x, domain=0)
        >>> _, updates = layer.apply(variables, x, domain=1, mutable=["batch_stats"])
        >>> print(updates["batch_stats"]["mean"].ravel())
        [0. 1.]
    """

    domains: int = 1
    share_affine: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: int | jax.Array | None = None,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalize `x` and, in training, update the statistics of its domain.

        Args:
            x: input, of any shape and floating dtype.
            use_running_average: as in `bnjax.linen.BatchNorm`.
            domain: one index for the batch or one for each example, as in
                `domain_batch_norm`. It may be omitted if there is one domain.
            mask: as in `bnjax.linen.BatchNorm`.
            residual: as in `bnjax.linen.BatchNorm`.
            update_stats: as in `bnjax.linen.BatchNorm`.

        Returns:
            The output, of the shape of `x`.
        """
        options = {"mask": mask, "residual": residual, "update_stats": update_stats}
        return self._call(x, use_running_average, domain=domain, **options)

    @nn.nowrap
    def _variable_shapes(
        self, features: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        stacked = (self.domains, *features)
        return stacked, features if self.share_affine else stacked


class NnxDomainBatchNorm(_Domains, bnjax.nnx.BatchNorm):
    """`bnjax.nnx.BatchNorm` with running statistics for each of several domains.

    `mean` and `var` have shape (domains, features), and so have `scale` and `bias`
    unless all domains share them. All domains start with equal values.

    Args:
        num_features: number of channels.
        domains: number of domains.
        share_affine: one scale and bias for all domains.
        **kwargs: the arguments of `bnjax.nnx.BatchNorm`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.variants.domains import NnxDomainBatchNorm
        >>> layer = NnxDomainBatchNorm(1, domains=2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0], [3.0]]), domain=1)
        >>> print(layer.mean[...].ravel())
        [0. 1.]
    """

    def __init__(
        self,
        num_features: int,
        *,
        domains: int = 1,
        share_affine: bool = False,
        **kwargs: Any,
    ):
        super().__init__(num_features, **kwargs)
        self.domains, self.share_affine = domains, share_affine
        params = () if share_affine else (self.scale, self.bias)
        for variable in (self.mean, self.var, *params):
            if variable is not None:
                stacked = jnp.broadcast_to(variable[...], (domains, num_features))
                variable.set_value(stacked)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: int | jax.Array | None = None,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalize `x` and, in training, update the statistics of its domain.

        The arguments and the result are those of `DomainBatchNorm`.
        """
        options = {"mask": mask, "residual": residual, "update_stats": update_stats}
        return self._call(x, use_running_average, domain=domain, **options)
