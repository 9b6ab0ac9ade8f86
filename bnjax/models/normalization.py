"""Which normalization a model uses: one home for all models."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import functional
from bnjax._validate import as_activation
from bnjax.functional import BatchStats
from bnjax.linen import BatchNorm
from bnjax.variants.ghost import GhostBatchNorm

Kind = Literal["batch", "flax", "none"]


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Normalize, then activate; or activate alone.

    Called inside a module's compact method, it adds the layer to that module.

    Args:
        kind: "batch" for `bnjax.linen.BatchNorm`, "flax" for
            `flax.linen.BatchNorm` (to compare with), "none" for no normalization.
        momentum: weight of the old running value (PyTorch's 0.1 is 0.9 here).
        epsilon: added to the variance.
        unbiased: give the running variance the m/(m-1) of Algorithm 2.
        virtual_batch_size: in training, statistics of so many examples at a time; see
            `bnjax.variants.ghost`. None for those of the batch.
        axis_name: in training, share statistics with the devices of this axis.
        axis_index_groups: groups of that axis, each with statistics of its own.
        deferred: in training, leave the running statistics as they are and write the
            moments of the batch to the collection "batch_moments", where that is
            mutable: `updated_stats` takes them up.
        frozen: normalize by the running statistics in training too, and leave them.
        record_inputs: where the collection "intermediates" is mutable, write the input
            of each nonlinearity there, as `<name of the layer>_input/value`.

    References:
        Ioffe and Szegedy 2015, sections 3.1 and 3.2.
    """

    kind: Kind = "batch"
    momentum: float = 0.99
    epsilon: float = 1e-5
    unbiased: bool = True
    virtual_batch_size: int | None = None
    axis_name: str | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    deferred: bool = False
    frozen: bool = False
    record_inputs: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise ValueError(
                f"Normalization: kind={self.kind!r}; expected one of {known}."
            )
        if self.kind == "flax" and self.unbiased:
            raise ValueError(
                "Normalization: flax.linen.BatchNorm keeps the biased variance only; "
                "pass unbiased=False to compare with it."
            )
        if self.kind == "flax" and (self.virtual_batch_size or self.deferred):
            raise ValueError(
                "Normalization: flax.linen.BatchNorm has the statistics of a whole "
                "batch only; pass virtual_batch_size=None and deferred=False to "
                "compare with it."
            )

    @property
    def needs_bias(self) -> bool:
        """Whether the layer before keeps its bias; the shift of BN replaces it."""
        return self.kind == "none"

    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        activation: str,
        name: str,
        residual: jax.Array | None = None,
        zero_scale: bool = False,
        per_activation: bool = False,
        dtype: Any = None,
        param_dtype: Any = None,
    ) -> jax.Array:
        """Return activation(BN(x) + residual); without BN where the kind is "none".

        `x` and `residual` are of shape (batch, ..., features), the variables are under
        `name`. With `zero_scale` the scale starts at 0, so that a residual block starts
        as the identity. With `per_activation` each position of a map is normalized by
        itself, over the batch alone, with a scale and bias of its own, of shape
        (height, width, channels).
        """
        nonlinear = activation != "identity"
        fused = self.kind == "batch" and not (self.record_inputs and nonlinear)
        if self.kind != "none":
            options: dict[str, Any] = {
                "use_running_average": self.frozen or not train,
                "momentum": self.momentum,
                "epsilon": self.epsilon,
                "axis": (-3, -2, -1) if per_activation else -1,
                "dtype": dtype,
                "name": name,
                "axis_name": self.axis_name,
                "axis_index_groups": self.axis_index_groups,
            }
            if zero_scale:
                options["scale_init"] = nn.initializers.zeros
            if param_dtype is not None:
                options["param_dtype"] = param_dtype
            if self.kind == "flax":
                x = nn.BatchNorm(**options)(x)
            else:
                options |= {
                    "activation": activation if fused else None,
                    "unbiased": self.unbiased,
                }
                layer: Any = BatchNorm
                if self.virtual_batch_size is not None or self.deferred:
                    size = self.virtual_batch_size
                    layer = functools.partial(GhostBatchNorm, virtual_batch_size=size)
                x = layer(**options)(x, residual=residual)
        if fused:
            return x
        if residual is not None and self.kind != "batch":
            x = x + residual
        if self.record_inputs and nonlinear:
            _Recorder(name=f"{name}_input")(x)
        activate = as_activation(activation)
        return x if activate is None else activate(x)

    def updated_stats(self, batch_stats: Any, batch_moments: Any) -> Any:
        """Return the collection `batch_stats`, moved once by each layer's Moments."""
        stats: dict[Any, Any] = dict(flatten_dict(batch_stats))
        found: dict[Any, Any] = dict(flatten_dict(batch_moments))
        for (*layer, _), moments in found.items():
            mean, var = (*layer, "mean"), (*layer, "var")
            new = functional.update_batch_stats(
                BatchStats(stats[mean], stats[var]),
                moments,
                momentum=self.momentum,
                unbiased=self.unbiased,
            )
            stats |= {mean: new.mean, var: new.var}
        return unflatten_dict(stats)


class _Recorder(nn.Module):
    """Writes its input to the collection "intermediates", where that is mutable."""

    @nn.compact
    def __call__(self, x: jax.Array) -> None:
        keep = {"init_fn": lambda: x, "reduce_fn": lambda _, new: new}
        self.sow("intermediates", "value", x, **keep)
