"""The last layer of every model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def classify(
    features: jax.Array,
    classes: int,
    *,
    train: bool,
    dropout: float = 0.0,
    kernel_init: nn.initializers.Initializer,
    param_dtype: Any,
) -> jax.Array:
    """Return logits, by a linear layer called "logits".

    Called inside a module's compact method, it adds the layer to that module. It is
    computed in float32 or wider, whatever the dtype of the layers before.

    Args:
        features: shape (batch, n).
        classes: number of logits.
        train: drop features, where there is dropout.
        dropout: rate at which features are dropped in training.
        kernel_init: of the weights.
        param_dtype: of the parameters.

    Returns:
        Logits, shape (batch, classes).
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    features = nn.Dropout(dropout, deterministic=not train)(features)
    return nn.Dense(
        classes, kernel_init=kernel_init, param_dtype=param_dtype, name="logits"
    )(features)
