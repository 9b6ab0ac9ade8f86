"""Networks to train, by name.

`create("mlp", ...)` builds a network. `MODELS` lists all networks, and `options` the
options of each. Every model is a `flax.linen.Module`, called as
`model(images, train=...)` with images of shape (batch, height, width, channels). It
returns logits of shape (batch, classes), float32 or wider. Options of the same name
have the same meaning in all models:

- `classes`: the number of logits;
- `normalization`: the normalization before each nonlinearity;
- `activation`: the name of a function of `jax.nn`;
- `width`: a factor on the number of filters of every layer; see `layers.scaled`;
- `weight_scale`: a factor on the standard deviation of the initial weights;
- `dropout`: the dropout rate before the classifier, with the rng stream "dropout";
- `dtype`: the dtype of the computation; None uses that of images and parameters;
- `param_dtype`: the dtype of the parameters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from bnjax._validate import did_you_mean
from bnjax.models.inception import Inception as Inception
from bnjax.models.lenet import LeNet as LeNet
from bnjax.models.mlp import MLP as MLP
from bnjax.models.normalization import Normalization as Normalization
from bnjax.models.resnet import SIZES
from bnjax.models.resnet import ResNet as ResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "inception": Inception,
    **{f"resnet{depth}": functools.partial(ResNet, depth=depth) for depth in SIZES},
}


def options(name: str) -> tuple[str, ...]:
    """Return the names of the options of a model."""
    if name not in MODELS:
        raise ValueError(
            f"models.create: there is no model {name!r}.{did_you_mean(name, MODELS)} "
            f"Expected one of: {', '.join(sorted(MODELS))}."
        )
    make = MODELS[name]
    given: set[str] = {"parent", "name"}
    if isinstance(make, functools.partial):
        given |= set(make.keywords)
        make = make.func
    fields = dataclasses.fields(make)  # pyright: ignore[reportArgumentType]
    return tuple(field.name for field in fields if field.name not in given)


def create(name: str, **given: Any) -> nn.Module:
    """Build a model by its name, without initializing it.

    Args:
        name: a key of `MODELS`.
        **given: options of the model.

    Returns:
        The module.

    Raises:
        ValueError: if there is no such model or option.

    Examples:
        >>> from bnjax import models
        >>> models.create("mlp", hidden=(32,), classes=3).hidden
        (32,)
    """
    known = options(name)
    for option in given:
        if option not in known:
            raise ValueError(
                f"models.create: {name!r} has no option {option!r}."
                f"{did_you_mean(option, known)} Expected one of: {', '.join(known)}."
            )
    return MODELS[name](**given)
