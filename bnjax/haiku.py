"""Batch normalization as a module of Haiku."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from bnjax import _validate, functional
from bnjax._validate import Activation
from bnjax.functional import BatchStats, Moments

__all__ = ["BatchNorm"]


class BatchNorm(hk.Module):
    r"""Batch normalization, a drop-in replacement for haiku.BatchNorm.

    $$
    y = f\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)
    $$

    as in `bnjax.batch_norm`, with scale $\gamma$, offset $\beta$, activation $f$ and
    residual $r$. Keywords and their meaning, and the names and shapes of the parameters
    and of the state, are those of haiku.BatchNorm: parameters and state of one module
    load into the other.

    For the mean and the variance each, the state holds

    - `hidden`, which starts at 0 and becomes decay_rate * hidden + (1 - decay_rate) *
      batch;
    - `counter`, the number $n$ of updates;
    - `average` = hidden / (1 - decay_rate^n), the statistics for inference. After the
      first update, these are the statistics of the batch itself. Before it, they are
      mean 0 and variance 1.

    The state is float32 (float64 for float64 input), also for inputs of half precision
    and under a policy of `hk.mixed_precision`.

    Args:
        create_scale: whether there is a trainable scale.
        create_offset: whether there is a trainable offset.
        decay_rate: weight of the old statistics (PyTorch's momentum of 0.1 is 0.9
            here).
        eps: $\epsilon$, added to the variance; positive.
        scale_init: initializer of the scale; ones if None.
        offset_init: initializer of the offset; zeros if None.
        axis: axes to take the statistics over; all except the channels if None.
        cross_replica_axis: axis or axes of an enclosing pmap, vmap or shard_map whose
            members share statistics, also nested ones. `init` needs none of them.
        cross_replica_axis_index_groups: groups of that axis.
        data_format: "channels_last", "channels_first", "N...C" or "NC...".
        name: name of the module.
        unbiased: True keeps the running variance with the factor $m / (m - 1)$ of the
            paper and of PyTorch. False, the default, keeps the biased variance, as
            Haiku does.
        use_fast_variance: False is exact everywhere. True, the default, is exact on one
            CPU or GPU (see `bnjax.batch_norm`).
        activation: applied in the layer: a name of jax.nn, such as "relu", or an
            elementwise function. Its derivative is recomputed from the layer's input.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            with the name of the module.

    Examples:
        >>> import haiku as hk, jax.numpy as jnp
        >>> from bnjax.haiku import BatchNorm
        >>> @hk.transform_with_state
        ... def network(x, is_training):
        ...     return BatchNorm(True, True, decay_rate=0.9)(x, is_training)
        >>> x = jnp.array([[1.0, -4.0], [3.0, 4.0]])
        >>> params, state = network.init(None, x, True)
        >>> y, state = network.apply(params, state, None, x, True)
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(state["batch_norm/~/var_ema"]["average"].round(3))
        [[ 1. 16.]]

    References:
        Ioffe & Szegedy (2015), Algorithms 1 and 2; Kingma & Ba (2015), section 3, for
        the division by 1 - decay_rate^n.
    """

    def __init__(
        self,
        create_scale: bool,
        create_offset: bool,
        decay_rate: float,
        eps: float = 1e-5,
        scale_init: hk.initializers.Initializer | None = None,
        offset_init: hk.initializers.Initializer | None = None,
        axis: Sequence[int] | None = None,
        cross_replica_axis: str | Sequence[str] | None = None,
        cross_replica_axis_index_groups: Sequence[Sequence[int]] | None = None,
        data_format: str = "channels_last",
        name: str | None = None,
        *,
        unbiased: bool = False,
        use_fast_variance: bool = True,
        activation: Activation | None = None,
    ):
        super().__init__(name=name)
        for given, needed, names in (
            (scale_init, create_scale, "scale_init without create_scale=True"),
            (offset_init, create_offset, "offset_init without create_offset=True"),
            (
                cross_replica_axis_index_groups,
                cross_replica_axis,
                "cross_replica_axis_index_groups without cross_replica_axis",
            ),
        ):
            if given is not None and not needed:
                layer = f"BatchNorm module {self.module_name}"
                raise ValueError(f"{layer}: {names}; expected both or neither.")
        self.create_scale = create_scale
        self.create_offset = create_offset
        self.decay_rate = decay_rate
        self.eps = eps
        self.scale_init = scale_init or jnp.ones
        self.offset_init = offset_init or jnp.zeros
        self.axis = axis
        self.cross_replica_axis = cross_replica_axis
        self.cross_replica_axis_index_groups = cross_replica_axis_index_groups
        self.channel_index = hk.get_channel_index(data_format)
        self.unbiased = unbiased
        self.use_fast_variance = use_fast_variance
        self.activation = activation
        self.mean_ema = _MovingAverage(jnp.zeros, name="mean_ema")
        self.var_ema = _MovingAverage(jnp.ones, name="var_ema")

    def __call__(
        self,
        inputs: jax.Array,
        is_training: bool,
        test_local_stats: bool = False,
        scale: jax.Array | None = None,
        offset: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalize `inputs` and, in training, update the statistics.

        Args:
            inputs: of any shape and floating dtype.
            is_training: normalize by the batch and update the statistics.
            test_local_stats: normalize by the batch although `is_training` is False.
            scale: broadcasts to `inputs`; not with create_scale=True. It may differ
                between examples, as in conditional normalization.
            offset: as `scale`, with create_offset.
            mask: which values count: booleans or weights that broadcast to `inputs`.
                The mask must have the rank of `inputs` if it could also be read as one
                entry per example.
            residual: added before the activation; shape of `inputs`.
            update_stats: whether to update the statistics; None updates them in
                training only. False in training normalizes by the batch and leaves them
                unchanged. True outside of training updates them too.

        Returns:
            The output, of the shape and dtype of `inputs`.
        """
        layer = f"BatchNorm module {self.module_name}"
        with _validate.naming(layer):
            for value, owned, name in (
                (scale, self.create_scale, "scale"),
                (offset, self.create_offset, "offset"),
            ):
                if owned and value is not None:
                    raise ValueError(
                        f"batch_norm: {name} was given in a call of a module with "
                        f"create_{name}=True; expected one or the other."
                    )
            _validate.check_flags(
                is_training=is_training,
                test_local_stats=test_local_stats,
                update_stats=update_stats,
            )
            x = _validate.as_input(inputs)
            features = _feature_axes(x.shape, self.axis, self.channel_index)
        kept = tuple(n if i in features else 1 for i, n in enumerate(x.shape))
        shape = tuple(x.shape[axis] for axis in features)
        if self.create_scale:
            scale = hk.get_parameter("scale", kept, x.dtype, self.scale_init)
        if self.create_offset:
            offset = hk.get_parameter("offset", kept, x.dtype, self.offset_init)
        dtype = _validate.promoted(x.dtype, jnp.float32)
        with _unrounded(dtype):
            mean = self.mean_ema.read(kept, dtype)
            # The variance of complex inputs is real.
            var = self.var_ema.read(kept, jnp.finfo(dtype).dtype)
        hidden, average = (
            BatchStats(m.reshape(shape), v.reshape(shape))
            for m, v in ((mean.hidden, var.hidden), (mean.average, var.average))
        )

        initializing = hk.running_init()
        # Too few values to train on, but enough to create the variables.
        single = initializing and x.size <= average.mean.size
        if update_stats is None:
            update_stats = is_training
        shared: dict[str, Any] = {}
        if not initializing:
            shared["axis_name"] = self.cross_replica_axis
            shared["axis_index_groups"] = self.cross_replica_axis_index_groups
        with _validate.naming(layer):
            mask = _validate.broadcast_mask(mask, x.shape)
            y, batch = _normalize(
                x,
                average,
                scale,
                offset,
                by_batch=(is_training or test_local_stats) and not single,
                origin=average.mean if self.use_fast_variance else None,
                axis=features,
                epsilon=self.eps,
                mask=mask,
                activation=self.activation,
                residual=residual,
                shared=shared,
            )
            if initializing or not update_stats:
                return y
            if batch is None:
                batch = functional.moments(x, axis=features, mask=mask, **shared)
            counter = mean.counter + 1
            hidden, average = _moved(
                counter, hidden, average, batch, self.decay_rate, self.unbiased
            )
        self.mean_ema.write(mean, counter, hidden.mean, average.mean)
        self.var_ema.write(var, counter, hidden.var, average.var)
        return y


class _Averaged(NamedTuple):
    """The state of a moving average, under the names of Haiku's own state."""

    counter: jax.Array
    hidden: jax.Array
    average: jax.Array


class _MovingAverage(hk.Module):
    """The state of haiku.ExponentialMovingAverage, with an initial average."""

    def __init__(self, start: hk.initializers.Initializer, name: str):
        super().__init__(name=name)
        self.start = start

    def read(self, shape: tuple[int, ...], dtype: Any) -> _Averaged:
        """The state, created in `dtype`; float32 if half precision was loaded."""
        hidden = hk.get_state("hidden", shape, dtype, init=jnp.zeros)
        average = hk.get_state("average", shape, dtype, init=self.start)
        dtype = _validate.promoted(hidden.dtype, jnp.float32)
        counter = hk.get_state("counter", (), jnp.int32, init=jnp.zeros)
        return _Averaged(counter, hidden.astype(dtype), average.astype(dtype))

    def write(
        self, old: _Averaged, counter: jax.Array, hidden: jax.Array, average: jax.Array
    ) -> None:
        """Write the new values, with the shapes and dtypes of the result of `read`."""
        hk.set_state("counter", counter)
        for name, value in (("hidden", hidden), ("average", average)):
            hk.set_state(name, value.reshape(old.hidden.shape).astype(old.hidden.dtype))


# Not methods of the module: a policy of hk.mixed_precision would round their arguments.


def _unrounded(dtype: Any) -> contextlib.AbstractContextManager:
    """A context in which a policy of hk.mixed_precision does not round the state."""
    policy = hk.mixed_precision.current_policy()
    if policy is None:
        return contextlib.nullcontext()
    policy = dataclasses.replace(policy, compute_dtype=dtype, output_dtype=dtype)
    return hk.mixed_precision.push_policy(_MovingAverage, policy)


def _feature_axes(
    shape: tuple[int, ...], axis: Sequence[int] | None, channel_index: int
) -> tuple[int, ...]:
    """The feature axes: all axes that Haiku's `axis` does not reduce over."""
    if axis is None:
        return _validate.split_axes(shape, channel_index)[0]
    _, features = _validate.split_axes(shape, axis)
    if not features:
        raise ValueError(
            f"batch_norm: axis={axis!r} takes the statistics over every axis of x of "
            f"shape {shape}; expected at least one axis to be left, of features."
        )
    return features


def _normalize(
    x: jax.Array,
    average: BatchStats,
    scale: jax.Array | None,
    offset: jax.Array | None,
    *,
    by_batch: bool,
    origin: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    shared: dict[str, Any],
    **options: Any,
) -> tuple[jax.Array, Moments | None]:
    """The output, and the moments of the batch if it is normalized by them."""

    def transform(scale=None, offset=None, **rest):
        if by_batch:
            rest |= options | shared
            return functional.normalize_batch(x, scale, offset, origin=origin, **rest)
        mean, var = average.mean, average.var
        return functional.normalize(
            x, mean, var, scale, offset, **options, **rest
        ), None

    features = options["axis"]
    kept = tuple(n if i in features else 1 for i, n in enumerate(x.shape))
    affine = [
        None if value is None else _broadcast(value, name, kept, x.shape)
        for value, name in ((scale, "scale"), (offset, "offset"))
    ]
    if all(value is None or value.shape == kept for value in affine):
        scale, offset = (
            v if v is None else v.reshape(average.mean.shape) for v in affine
        )
        return transform(scale, offset, activation=activation, residual=residual)
    # Conditional normalization: scale and offset differ between values of a channel.
    scale, offset = affine
    dtype = _validate.promoted(x.dtype, jnp.float32)
    y, batch = transform(dtype=dtype)
    if scale is not None:
        y = y * scale.astype(dtype)
    residual = _validate.check_residual(residual, x.shape)
    for added in (offset, residual):
        y = y if added is None else y + added.astype(dtype)
    function = _validate.as_activation(activation)
    y = y if function is None else function(y)
    return y.astype(x.dtype), batch


def _broadcast(
    value: jax.Array, name: str, kept: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """A scale or offset with one value per feature if possible, else one per value."""
    value = _validate.as_input(value, name)
    for wanted in (kept, shape):
        pairs = zip(value.shape[::-1], wanted[::-1], strict=False)
        if value.ndim <= len(wanted) and all(n in (1, m) for n, m in pairs):
            return jnp.broadcast_to(value, wanted)
    raise ValueError(
        f"batch_norm: {name} has shape {value.shape}; expected a shape that broadcasts "
        f"to x of shape {shape}."
    )


def _moved(
    counter: jax.Array,
    hidden: BatchStats,
    average: BatchStats,
    batch: Moments,
    decay_rate: float | jax.Array,
    unbiased: bool,
) -> tuple[BatchStats, BatchStats]:
    """The hidden state and the average after update number `counter`."""
    move = functools.partial(functional.update_batch_stats, hidden, momentum=decay_rate)
    moved = move(batch, unbiased=unbiased)
    # A channel with too few values (all may be masked) is updated by its own average:
    # the counter counts this channel too, and its average stays the same.
    again = move(
        Moments(average.mean, average.var, jnp.full_like(batch.count, 2)),
        unbiased=False,
    )
    enough = batch.count > 1
    new = jax.tree.map(lambda a, b: jnp.where(enough, a, b), moved, again)
    # 1 - decay_rate**counter, which loses digits if the decay rate is close to 1.
    dtype = new.var.dtype
    log = jnp.log1p(jnp.asarray(decay_rate - 1, dtype))
    weight = -jnp.expm1(counter.astype(dtype) * log)

    def debiased(hidden, average):
        quotient = hidden / jnp.where(weight > 0, weight, 1).astype(hidden.dtype)
        return jnp.where(weight > 0, quotient, average)

    return new, jax.tree.map(debiased, new, average)
