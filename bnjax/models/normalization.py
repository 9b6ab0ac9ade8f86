"""The normalization of a model, as one option for all models."""

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
    """Normalize and then apply the activation, or apply the activation only.

    Call it inside the compact method of a module: it adds the layer to that module.

    Attributes:
        kind: "batch" for `bnjax.linen.BatchNorm`, "flax" for
            `flax.linen.BatchNorm` (for comparisons), "none" for no normalization.
        momentum: the weight of the old running value (PyTorch's 0.1 is 0.9 here).
        epsilon: the number added to the variance.
        unbiased: keep the running variance with the factor m/(m-1) of Algorithm 2.
        virtual_batch_size: compute the statistics of training over this many examples
            at a time; see `bnjax.variants.ghost`. None uses the whole batch.
        axis_name: share the statistics of training with the devices of this axis.
        axis_index_groups: groups of devices along that axis, each with its own
            statistics.
        deferred: in training, do not update the running statistics, but write the
            moments of the batch to the collection "batch_moments" if it is mutable;
            `updated_stats` then updates the running statistics.
        frozen: normalize by the running statistics in training too, and do not update
            them.
        record_inputs: write the input of each nonlinearity to the collection
            "intermediates" if it is mutable, as `<name of the layer>_input/value`.

    References:
        Ioffe & Szegedy (2015), sections 3.1 and 3.2.
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
        """Return activation(BN(x) + residual), without BN if the kind is "none".

        Args:
            x: the input, shape (batch, ..., features).
            train: whether to normalize by batch statistics.
            activation: the name of a function of `jax.nn`.
            name: the name of the layer in the variables.
            residual: an array of the shape of `x` to add, or None.
            zero_scale: start the scale at 0, so that a residual block starts as the
                identity.
            per_activation: normalize each position of a map by itself, over the batch
                only, with a scale and bias of shape (height, width, channels).
            dtype: the dtype of the result.
            param_dtype: the dtype of the parameters.

        Returns:
            The activations, with the shape of `x`.
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
        """Return `batch_stats` after one update by each layer's `Moments`."""
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
    """Writes its input to the collection "intermediates" if it is mutable."""

    @nn.compact
    def __call__(self, x: jax.Array) -> None:
        keep = {"init_fn": lambda: x, "reduce_fn": lambda _, new: new}
        self.sow("intermediates", "value", x, **keep)
