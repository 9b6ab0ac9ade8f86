"""Which normalization a model uses: one home for all models."""

import dataclasses
from typing import Any, Literal, get_args

import jax
from flax import linen as nn

from bnjax.linen import BatchNorm

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

    Raises:
        ValueError: the kind is unknown, or Flax's layer is asked for an unbiased
            variance, which it does not have.

    References:
        Ioffe and Szegedy 2015, sections 3.1 and 3.2.
    """

    kind: Kind = "batch"
    momentum: float = 0.99
    epsilon: float = 1e-5
    unbiased: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"Normalization: kind={self.kind!r}; expected one of "
                f"{', '.join(get_args(Kind))}."
            )
        if self.kind == "flax" and self.unbiased:
            raise ValueError(
                "Normalization: flax.linen.BatchNorm keeps the biased variance only; "
                "pass unbiased=False to compare with it."
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
        dtype: Any = None,
        param_dtype: Any = None,
    ) -> jax.Array:
        """Return activation(BN(x)), or activation(x) where the kind is "none".

        Args:
            x: pre-activations, shape (batch, ..., features).
            train: normalize by the batch and update the running statistics.
            activation: a name of `jax.nn`.
            name: of the layer in the variables.
            dtype: of the output; that of `x` and the parameters if None.
            param_dtype: of scale and bias; float32 if None.

        Returns:
            An array of the shape of `x`.
        """
        activate = getattr(jax.nn, activation)
        if self.kind == "none":
            return activate(x)
        options: dict[str, Any] = {
            "use_running_average": not train,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "dtype": dtype,
            "name": name,
        }
        if param_dtype is not None:
            options["param_dtype"] = param_dtype
        if self.kind == "flax":
            return activate(nn.BatchNorm(**options)(x))
        layer = BatchNorm(unbiased=self.unbiased, activation=activation, **options)
        return layer(x)
