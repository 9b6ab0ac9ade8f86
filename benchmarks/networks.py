"""Networks to measure batch normalization in, and their training steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import models
from bnjax.models import Normalization
from bnjax.models.layers import ConvNorm
from bnjax.models.resnet import Bottleneck

KINDS = {
    "bnjax": Normalization(unbiased=False),
    "flax": Normalization(kind="flax", unbiased=False),
    "none": Normalization(kind="none", unbiased=False),
}
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of bnjax.models and the batch that it is trained on.

    Args:
        model: its name.
        options: of the model.
        shape: of a batch of images.
        classes: number of labels.
    """

    model: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    classes: int = 10

    def create(self, kind: str) -> nn.Module:
        """Build it with one of `KINDS`."""
        return models.create(
            self.model,
            classes=self.classes,
            normalization=KINDS[kind],
            **self.options,
        )


NETWORKS = {
    "mlp": Network("mlp", {}, (60, 28, 28, 1)),
    "inception": Network(
        "inception", {"width": 0.125, "stem": "small"}, (32, 32, 32, 3)
    ),
    "resnet50": Network("resnet50", {}, (4, 64, 64, 3), classes=1000),
}


class Stack(nn.Module):
    """Layers of convolution (or a dense layer), BN and ReLU, one after the other.

    Args:
        layers: how many.
        features: of each.
        normalization: called as `bnjax.models.Normalization` is.
        dense: dense layers instead of 3x3 convolutions.
        dtype: of the computation.
    """

    layers: int
    features: int
    normalization: Any
    dense: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return an array of shape (..., features)."""
        for layer in range(self.layers):
            options = {"use_bias": False, "dtype": self.dtype, "name": f"layer{layer}"}
            if self.dense:
                x = nn.Dense(self.features, **options)(x)
            else:
                x = nn.Conv(self.features, (3, 3), **options)(x)
            x = self.normalization(
                x, train=train, activation="relu", name=f"bn{layer}", dtype=self.dtype
            )
        return x


class Blocks(nn.Module):
    """Bottleneck blocks of a residual network, each with its addition.

    Args:
        blocks: how many.
        features: of the 3x3 convolution of each; the input has four times as many.
        normalization: called as `bnjax.models.Normalization` is.
        dtype: of the computation.
    """

    blocks: int
    features: int
    normalization: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return an array of the shape of `x`, (batch, height, width, channels)."""
        conv = functools.partial(
            ConvNorm, normalization=self.normalization, dtype=self.dtype
        )
        for block in range(self.blocks):
            layer = Bottleneck(self.features, 1, False, conv, name=f"block{block}")
            x = layer(x, train=train)
        return x


def random_variables(model: Any, images: jax.Array, seed: int) -> Any:
    """Make variables that keep the activations of every layer of one size."""
    random = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            value = random.normal(0, np.sqrt(2 / fan_in), leaf.shape)
        elif name in ("scale", "var"):
            value = random.uniform(0.5, 1.5, leaf.shape)
        else:
            value = random.normal(0, 0.2, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(
        lambda images: model.init(jax.random.key(seed), images, train=False), images
    )
    return jax.tree_util.tree_map_with_path(fill, dict(shapes))


def initial(model: nn.Module, images: Any, seed: int = 0) -> dict[str, Any]:
    """Return params and batch_stats; the latter empty without BN."""
    # Not the model's own, whose random numbers take minutes to compile.
    variables = random_variables(model, images, seed)
    return {"params": variables["params"], "stats": variables.get("batch_stats", {})}


def loss_of(model: nn.Module) -> Callable[..., tuple[jax.Array, Any]]:
    """Return the loss as a function of params, stats, images and labels."""

    def loss(params, stats, images, labels):
        outputs, updates = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        if labels is None:
            return jnp.mean(jnp.square(outputs.astype(jnp.float32))), updates
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return losses.mean(), updates

    return loss


def make_step(model: nn.Module) -> Callable[..., dict[str, Any]]:
    """Return a step of SGD with momentum as a function of state, images and labels."""
    loss = loss_of(model)

    def step(state, images, labels):
        gradients, updates = jax.grad(loss, has_aux=True)(
            state["params"], state["stats"], images, labels
        )
        changes, moving = OPTIMIZER.update(
            gradients, state["optimizer"], state["params"]
        )
        return {
            "params": optax.apply_updates(state["params"], changes),
            "stats": updates.get("batch_stats", {}),
            "optimizer": moving,
        }

    return step


def first_state(model: nn.Module, images: jax.Array) -> dict[str, Any]:
    """Return the state of `make_step` before the first step."""
    state = initial(model, images)
    return state | {"optimizer": jax.jit(OPTIMIZER.init)(state["params"])}


def batch_of(network: Network, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return random images and labels."""
    random = np.random.default_rng(seed)
    images = random.standard_normal(network.shape, np.float32)
    labels = random.integers(0, network.classes, network.shape[0])
    return jnp.asarray(images), jnp.asarray(labels, jnp.int32)
