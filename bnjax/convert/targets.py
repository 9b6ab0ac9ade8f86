"""The targets of a conversion: what replaces the batch norm layers of a model."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import _validate
from bnjax._moments import AxisName
from bnjax.convert import layers as kinds
from bnjax.variants.ghost import GhostBatchNorm, NnxGhostBatchNorm

Layers = str | Iterable[str] | Callable[[str, Any], bool] | None


@dataclasses.dataclass(frozen=True)
class ToBatchNorm:
    """Replace layers by `bnjax.linen.BatchNorm` or `bnjax.nnx.BatchNorm`.

    The new layer keeps the scale, the bias, the running statistics and every attribute.
    A layer of bnjax keeps its class and changes its attributes only. An attribute that
    is None here keeps the value of the layer.

    Attributes:
        axis_name: the axis or axes of pmap or shard_map whose devices share statistics;
            () for none. Under jit with sharded arrays, devices share statistics without
            an axis name.
        axis_index_groups: groups of devices along that axis.
        virtual_batch_size: compute the statistics of training over this many examples
            at a time, by `bnjax.variants.ghost`.
        momentum: the weight of the old statistics (PyTorch's 0.1 is 0.9 here).
        epsilon: the number added to the variance. Another value changes the function.
        unbiased: keep the running variance with the factor m / (m - 1).
        use_running_average: the mode of the layers, including frozen layers, whatever
            mode the model passes to them. False trains a model that was written for
            inference. In nnx, `train()` and `eval()` still switch the mode. For linen,
            make one model for each mode.
    """

    axis_name: AxisName | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    virtual_batch_size: int | None = None
    momentum: float | None = None
    epsilon: float | None = None
    unbiased: bool | None = None
    use_running_average: bool | None = None

    def __post_init__(self) -> None:
        groups = self.axis_index_groups
        if groups is not None and not self.axis_name:
            raise ValueError(
                f"convert: axis_index_groups={groups!r} without axis_name; expected "
                "the name of the axis that the groups divide."
            )
        if isinstance(self.axis_name, list):
            object.__setattr__(self, "axis_name", tuple(self.axis_name))
        if groups is not None:
            groups = tuple(map(tuple, groups))
            object.__setattr__(self, "axis_index_groups", groups)
        if self.momentum is not None:
            _validate.check_momentum(self.momentum)
        if self.epsilon is not None:
            _validate.check_epsilon(self.epsilon)

    def in_evaluation(self) -> "ToBatchNorm":
        """The same target; if it sets the mode, the mode is that of evaluation."""
        if self.use_running_average is None:
            return self
        return dataclasses.replace(self, use_running_average=True)

    def linen(self, name: str, layer: nn.BatchNorm) -> nn.Module:
        """Return the new layer for a linen layer, not bound to a scope."""
        ours = bnjax.linen.BatchNorm, GhostBatchNorm, kinds.LinenFrozenBatchNorm
        return _linen_like(name, layer, self._kind(layer, *ours), **self._changes())

    def nnx(self, name: str, layer: nnx.BatchNorm) -> None:
        """Turn an nnx layer into the new layer, in place."""
        ours = bnjax.nnx.BatchNorm, NnxGhostBatchNorm, kinds.NnxFrozenBatchNorm
        kind = self._kind(layer, *ours)
        if self.use_running_average is not None or hasattr(layer, kinds.OWN_MODE):
            kind = kinds.own_mode(kind)
        _turn_into(name, layer, kind, **self._changes())

    def _kind(self, layer: Any, plain: Any, ghost: Any, frozen: Any) -> Any:
        if isinstance(layer, frozen):
            if self.use_running_average is None:
                return type(layer)
        elif self.virtual_batch_size is None and isinstance(layer, plain):
            return type(layer)
        return plain if self.virtual_batch_size is None else ghost

    def _changes(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes = {name: value for name, value in fields.items() if value is not None}
        if self.axis_name is not None:
            axis_name = self.axis_name or None
            changes |= {"axis_name": axis_name}
            changes |= {"axis_index_groups": self.axis_index_groups}
        return changes


@dataclasses.dataclass(frozen=True)
class ToFrozen:
    """Freeze layers: they normalize by their running statistics in training too.

    Training does not change these statistics.

    Attributes:
        train_scale_and_bias: False stops the gradient of scale and bias. Both stay
            parameters: an optimizer with weight decay still shrinks them unless the
            decay is masked.
    """

    train_scale_and_bias: bool = True

    def in_evaluation(self) -> "ToFrozen":
        """The same target, because it has only one mode."""
        return self

    def linen(self, name: str, layer: nn.BatchNorm) -> nn.Module:
        """Return the new layer for a linen layer, not bound to a scope."""
        changes = {**dataclasses.asdict(self), "use_running_average": True}
        return _linen_like(name, layer, kinds.LinenFrozenBatchNorm, **changes)

    def nnx(self, name: str, layer: nnx.BatchNorm) -> None:
        """Turn an nnx layer into the new layer, in place."""
        _turn_into(name, layer, kinds.NnxFrozenBatchNorm, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class ToGroupNorm:
    """Replace layers by group normalization with a new scale and bias.

    The function of the model changes. Group normalization computes the statistics of
    one example over a group of its channels, in training and in evaluation. The new
    layer keeps epsilon, the dtypes, the activation and the residual. Scale and bias
    start at 1 and 0; in linen, the initializers of the layer set them.

    Attributes:
        num_groups: the number of groups, a divisor of the number of channels.
        group_size: the number of channels in a group. If it is given, `num_groups` is
            None.
        seed: the seed of random initializers.

    References:
        Wu & He (2018), "Group normalization".
    """

    num_groups: int | None = 32
    group_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [
            size for size in (self.num_groups, self.group_size) if size is not None
        ]
        if len(sizes) != 1 or sizes[0] < 1:
            raise ValueError(
                f"convert: num_groups={self.num_groups} and group_size="
                f"{self.group_size}; expected one of the two, 1 or more, and None for "
                "the other."
            )

    def in_evaluation(self) -> "ToGroupNorm":
        """The same target, because it has only one mode."""
        return self

    def linen(self, name: str, layer: nn.BatchNorm) -> nn.Module:
        """Return the new layer for a linen layer, not bound to a scope."""
        kinds.check_last_axis(name, layer.axis)
        sizes = {"num_groups": self.num_groups, "group_size": self.group_size}
        alone = {"axis_name": None, "axis_index_groups": None}
        return _linen_like(name, layer, kinds.LinenGroupNorm, **sizes, **alone)

    def nnx(self, name: str, layer: nnx.BatchNorm) -> None:
        """Turn an nnx layer into the new layer, in place."""
        kinds.check_last_axis(name, layer.axis)
        kinds.check_groups(name, layer.num_features, self.num_groups, self.group_size)
        groups = self.num_groups or layer.num_features // (self.group_size or 1)
        _turn_into(
            name,
            layer,
            kinds.NnxGroupNorm,
            num_groups=groups,
            group_size=layer.num_features // groups,
            feature_axis=-1,
            reduction_axes=None,
            axis_name=None,
            axis_index_groups=None,
        )
        del layer.mean, layer.var
        for variable, start in ((layer.scale, 1), (layer.bias, 0)):
            if variable is not None:
                variable[...] = jnp.full_like(variable[...], start)


Target = ToBatchNorm | ToFrozen | ToGroupNorm


class Conversion(NamedTuple):
    """A target, and the layers that it replaces."""

    to: Any
    layers: Any

    def fits(self, name: str, layer: Any) -> bool:
        """Whether to replace this layer."""
        if self.layers is None:
            return True
        if callable(self.layers):
            return bool(self.layers(name, layer))
        return any(fnmatch.fnmatchcase(name, each) for each in self.layers)

    def choose(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the layers to replace, by name; raise an error if there are none."""
        listed = f"Its batch norm layers are: {', '.join(found)}."
        if not found:
            raise ValueError(
                "convert: the model calls no batch norm layer; expected flax's or "
                "bnjax's BatchNorm in it."
            )
        for pattern in () if callable(self.layers) else self.layers or ():
            if not fnmatch.filter(found, pattern):
                raise ValueError(
                    f"convert: layers={pattern!r} matches no layer."
                    f"{_validate.did_you_mean(pattern, found)} {listed}"
                )
        chosen = {name: each for name, each in found.items() if self.fits(name, each)}
        if not chosen:
            raise ValueError(
                "convert: layers is a function that returns True for no layer; "
                f"expected True for one or more. {listed}"
            )
        return chosen


def _linen_like(
    name: str, layer: nn.BatchNorm, kind: type[nn.Module], **changes: Any
) -> nn.Module:
    kinds.refuse_loss(name, type(layer), kind)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    fields = {
        field.name: getattr(layer, field.name)
        for field in dataclasses.fields(layer)
        if field.name in known - {"parent"}
    }
    # A frozen layer has no virtual batches.
    fields |= {field: value for field, value in changes.items() if field in known}
    return kind(**fields, parent=None)


def _turn_into(name: str, layer: Any, kind: type, **changes: Any) -> None:
    kinds.refuse_loss(name, type(layer), kind)
    if not isinstance(layer, bnjax.nnx.BatchNorm):
        layer.unbiased, layer.activation = False, None
    layer.__class__ = kind
    for attribute, value in changes.items():
        setattr(layer, attribute, value)
