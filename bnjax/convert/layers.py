"""The layers that replace batch norm: frozen, group norm, with a fixed mode."""

import functools
import inspect
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

import bnjax.linen
import bnjax.nnx
from bnjax import _validate
from bnjax._validate import Activation, layer_name
from bnjax.functional import BatchStats
from bnjax.variants.ghost import GhostBatchNorm, NnxGhostBatchNorm

# Marks of the classes that bnjax.convert derives from a model's or a layer's class.
EXCHANGED_KIND, OWN_MODE = "exchanged_kind", "own_mode"


class LinenFrozenBatchNorm(bnjax.linen.BatchNorm):
    """A `bnjax.linen.BatchNorm` that always normalizes by its running statistics."""

    use_running_average: bool | None = True
    train_scale_and_bias: bool = True

    @nn.nowrap
    def _transform(
        self, x: Any, scale: Any, bias: Any, batch_stats: BatchStats, **options: Any
    ) -> tuple[jax.Array, BatchStats]:
        if not self.train_scale_and_bias:
            scale, bias = lax.stop_gradient((scale, bias))
        return super()._transform(x, scale, bias, batch_stats, **options)


class LinenGroupNorm(nn.GroupNorm):
    """A `flax.linen.GroupNorm` with the call signature of `bnjax.linen.BatchNorm`."""

    activation: Activation | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalize `x`; there is one mode, and there are no statistics."""
        del use_running_average, update_stats
        _refuse_mask(mask)
        check_groups(
            layer_name(self.path), x.shape[-1], self.num_groups, self.group_size
        )
        return _finished(super().__call__(x), residual, self.activation)


class NnxFrozenBatchNorm(bnjax.nnx.BatchNorm):
    """A `bnjax.nnx.BatchNorm` that always normalizes by its running statistics."""

    train_scale_and_bias: bool

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        """Normalize `x`; the mode is ignored."""
        del use_running_average
        return super().__call__(x, True, **kwargs)

    def _transform(
        self, x: Any, scale: Any, bias: Any, batch_stats: BatchStats, **options: Any
    ) -> tuple[jax.Array, BatchStats]:
        if not self.train_scale_and_bias:
            scale, bias = lax.stop_gradient((scale, bias))
        return super()._transform(x, scale, bias, batch_stats, **options)


class NnxGroupNorm(nnx.GroupNorm):
    """A `flax.nnx.GroupNorm` with the call signature of `bnjax.nnx.BatchNorm`."""

    activation: Activation | None

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalize `x`; there is one mode, and there are no statistics."""
        del use_running_average, update_stats
        _refuse_mask(mask)
        return _finished(super().__call__(x), residual, self.activation)


@functools.cache
def own_mode(kind: Any) -> Any:
    """Return a class of nnx layers whose mode only `train()` and `eval()` set."""
    if hasattr(kind, OWN_MODE):
        return kind

    def call(self: Any, x: Any, use_running_average: Any = None, **kwargs: Any) -> Any:
        del use_running_average
        return kind.__call__(self, x, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, OWN_MODE: True})


_KNOWN = (
    nn.BatchNorm,
    nnx.BatchNorm,
    bnjax.linen.BatchNorm,
    bnjax.nnx.BatchNorm,
    GhostBatchNorm,
    NnxGhostBatchNorm,
    LinenFrozenBatchNorm,
    NnxFrozenBatchNorm,
)


def refuse_loss(name: str, old: type, new: type) -> None:
    """Refuse to replace a layer if the new class would lose methods of the old one."""
    for kind in old.__mro__:
        made_here = not vars(kind).keys().isdisjoint((EXCHANGED_KIND, OWN_MODE))
        if issubclass(new, kind) or kind in _KNOWN or made_here:
            continue
        lost = [
            f"{kind.__name__}.{key}"
            for key, value in vars(kind).items()
            if inspect.isfunction(value) and (key == "__call__" or key[:2] != "__")
        ]
        if lost:
            raise ValueError(
                f"convert: layer {name} is a {old.__module__}.{old.__qualname__}; the "
                f"work of {', '.join(lost)}, such as an activation, would be lost. "
                "Expected a layer without a call of its own: leave this layer out with "
                "layers=..., or derive its class from bnjax's BatchNorm."
            )


def _refuse_mask(mask: jax.Array | None) -> None:
    if mask is not None:
        raise ValueError(
            "convert: a mask was given to a layer that is now a GroupNorm, which "
            "normalizes each example by itself; expected no mask. Leave the layer out "
            "with layers=..."
        )


def check_last_axis(name: str, axis: Any) -> None:
    """Refuse a layer whose channels are not along the last axis."""
    if axis != -1:
        raise ValueError(
            f"convert: layer {name} has axis={axis!r}; expected -1, because GroupNorm "
            "expects the channels last. Leave the layer out with layers=..."
        )


def check_groups(
    name: str, features: int, num_groups: int | None, group_size: int | None
) -> None:
    """Refuse groups that do not divide the channels of a layer."""
    size = num_groups or group_size or 1
    if features % size:
        raise ValueError(
            f"convert: layer {name} has {features} channels, num_groups={num_groups} "
            f"and group_size={group_size}; expected a divisor of the channels, such as "
            f"{np.gcd(features, size)}."
        )


def _finished(
    y: jax.Array, residual: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """Add the residual and apply the activation, as bnjax's layer does."""
    activate = _validate.as_activation(activation)
    residual = _validate.check_residual(residual, y.shape)
    y = y if residual is None else y + residual
    return y if activate is None else activate(y)
