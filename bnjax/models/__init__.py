"""Networks to train, by name.

`create("mlp", ...)` builds one; `MODELS` lists what there is, `options` what each can
be told. Every model is a `flax.linen.Module` called as `model(images, train=...)`, with
images of shape (batch, height, width, channels), and returns logits of shape (batch,
classes), float32 or wider. Options of the same name mean the same in all:

- `classes`: number of logits;
- `normalization`: what stands before each nonlinearity;
- `activation`: a name of `jax.nn`;
- `width`: factor on the number of filters of every layer; see `layers.scaled`;
- `weight_scale`: factor on the standard deviation of the initial weights;
- `dropout`: rate before the classifier; rng stream "dropout";
- `dtype`: of the computation; that of images and parameters if None;
- `param_dtype`: of the parameters.
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
    """Return the names of what the model called `name` can be told."""
    if name not in MODELS:
        raise ValueError(
            f"models.create: no model is called {name!r}.{did_you_mean(name, MODELS)} "
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
    """Build the model called `name`, with its own options; not yet initialized.

    Example:
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
