"""Networks to train, by name.

`create("mlp", ...)` builds one; `MODELS` lists what there is. Every model is a
`flax.linen.Module` called as `model(images, train=...)` and returns logits.
"""

from typing import Any

from flax import linen as nn

from bnjax._checks import did_you_mean
from bnjax.models.mlp import MLP as MLP
from bnjax.models.normalization import Normalization as Normalization

MODELS: dict[str, type[nn.Module]] = {"mlp": MLP}


def create(name: str, **options: Any) -> nn.Module:
    """Build the model called `name`.

    Args:
        name: a key of `MODELS`.
        **options: the model's own fields, such as `classes` or `normalization`.

    Returns:
        The module, not yet initialized.

    Raises:
        ValueError: no model has that name.

    Example:
        >>> from bnjax import models
        >>> models.create("mlp", hidden=(32,), classes=3).hidden
        (32,)
    """
    if name not in MODELS:
        raise ValueError(
            f"models.create: no model is called {name!r}.{did_you_mean(name, MODELS)} "
            f"Expected one of: {', '.join(sorted(MODELS))}."
        )
    return MODELS[name](**options)
