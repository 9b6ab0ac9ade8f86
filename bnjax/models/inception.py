"""The Inception network of the paper (Figure 5)."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax.models.layers import (
    ConvNorm,
    check_choice,
    check_images,
    check_width,
    classify,
    convolution_init,
    local_response_normalization,
    scaled,
)
from bnjax.models.normalization import Normalization

Stem = Literal["imagenet", "small"]


@dataclasses.dataclass(frozen=True)
class ModuleSize:
    """A row of Figure 5: the number of filters in each branch of a module.

    Attributes:
        name: the name in the figure.
        conv_1x1: filters of the branch of 1x1 filters only; 0 for no such branch.
        reduce_3x3: filters of the 1x1 before the 3x3.
        conv_3x3: filters of the 3x3.
        reduce_double: filters of the 1x1 before the two 3x3.
        double_3x3: filters of each of the two 3x3.
        pool: the pooling of 3x3 pixels in the last branch.
        projection: filters of the 1x1 after the pooling; 0 for no projection.
        stride: the stride of the 3x3, of the second of the two 3x3, and of the pooling.
    """

    name: str
    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    reduce_double: int
    double_3x3: int
    pool: Literal["avg", "max"]
    projection: int
    stride: int = 1


MODULES = (
    ModuleSize("3a", 64, 64, 64, 64, 96, "avg", 32),
    ModuleSize("3b", 64, 64, 96, 64, 96, "avg", 64),
    ModuleSize("3c", 0, 128, 160, 64, 96, "max", 0, stride=2),
    ModuleSize("4a", 224, 64, 96, 96, 128, "avg", 128),
    ModuleSize("4b", 192, 96, 128, 96, 128, "avg", 128),
    ModuleSize("4c", 160, 128, 160, 128, 160, "avg", 128),
    ModuleSize("4d", 96, 128, 192, 160, 192, "avg", 128),
    ModuleSize("4e", 0, 128, 192, 192, 256, "max", 0, stride=2),
    ModuleSize("5a", 352, 192, 320, 160, 224, "avg", 128),
    ModuleSize("5b", 352, 192, 320, 192, 224, "max", 128),
)
"""The ten modules with the filters of Figure 5."""

PRINTED_MODULES = tuple(
    dataclasses.replace(size, projection=96) if size.name in ("4c", "4d") else size
    for size in MODULES
)
"""The ten modules with the printed output depths of Figure 5, as in TF-slim."""


class InceptionModule(nn.Module):
    """Branches with filters of several sizes, concatenated along the channels.

    Attributes:
        size: the filters of each branch.
        width: a factor on the number of filters.
        conv: a function that makes a `ConvNorm` from features, kernel, stride and name.

    References:
        Szegedy et al. (2015), "Going deeper with convolutions", section 4; Ioffe &
        Szegedy (2015), Figure 5.
    """

    size: ModuleSize
    width: float
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return shape (batch, height / stride, width / stride, output channels)."""

        def conv(x: Any, features: int, kernel: int, name: str, stride: int = 1) -> Any:
            layer = self.conv(scaled(features, self.width), kernel, stride, name=name)
            return layer(x, train=train)

        size, stride = self.size, self.size.stride
        branches = []
        if size.conv_1x1:
            branches.append(conv(x, size.conv_1x1, 1, "conv_1x1"))

        y = conv(x, size.reduce_3x3, 1, "reduce_3x3")
        branches.append(conv(y, size.conv_3x3, 3, "conv_3x3", stride))

        y = conv(x, size.reduce_double, 1, "reduce_double")
        y = conv(y, size.double_3x3, 3, "double_3x3_a")
        branches.append(conv(y, size.double_3x3, 3, "double_3x3_b", stride))

        y = _pool(x, size.pool, stride)
        if size.projection:
            y = conv(y, size.projection, 1, "projection")
        branches.append(y)
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """The network of Figure 5 of the paper; every convolution is a `ConvNorm`.

    The network has the filters of the figure. Some printed depths of the figure are not
    the sums of its filters: 4c and 4d sum to 608, where the figure prints 576, and 4e
    then sums to 1056, where it prints 1024. For the baseline that the paper calls
    Inception, use `normalization` of kind "none", `local_response_norm` and `dropout`
    0.4. The network has no auxiliary classifiers of GoogLeNet, which the paper does not
    mention. The other attributes are described in `bnjax.models`.

    Attributes:
        stem: the layers before module 3a. "imagenet" has 7x7 filters of stride 2 and
            reduces height and width to an eighth. "small" is for images of 32x32: it
            has 3x3 filters of stride 1 and reduces height and width to a quarter.
        separable_conv1: make the first convolution separable with depth multiplier 8.
        printed_depths: project to 96 channels in 4c and 4d, as TF-slim does, which
            gives the printed depths.
        local_response_norm: add local response normalization after the first pooling
            and before the second.
        per_activation: normalize each position by itself in modules 5a and 5b. The
            parameters then fit only one image size.
        weight_scale: a factor on He's standard deviation of the convolutions.

    References:
        Ioffe & Szegedy (2015), section 4.2 and Figure 5.
    """

    classes: int = 1000
    width: float = 1.0
    stem: Stem = "imagenet"
    separable_conv1: bool = False
    printed_depths: bool = False
    local_response_norm: bool = False
    dropout: float = 0.0
    normalization: Normalization = Normalization()
    per_activation: bool = False
    activation: str = "relu"
    weight_scale: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits."""
        check_images("Inception", images)
        check_width("Inception", self.width)
        check_choice("Inception: stem", self.stem, get_args(Stem))
        conv = functools.partial(
            ConvNorm,
            normalization=self.normalization,
            activation=self.activation,
            kernel_init=convolution_init(self.weight_scale),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        lrn = self.local_response_norm
        respond = local_response_normalization if lrn else lambda x: x
        filters = functools.partial(scaled, width=self.width)
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        separable: Any = {"depth_multiplier": 8} if self.separable_conv1 else {}
        x = conv(filters(64), kernel, stride, name="conv1", **separable)(
            images, train=train
        )
        x = respond(_pool(x, "max", 2))
        x = conv(filters(64), 1, name="conv2_reduce")(x, train=train)
        x = respond(conv(filters(192), 3, name="conv2")(x, train=train))
        x = _pool(x, "max", 2)
        for size in PRINTED_MODULES if self.printed_depths else MODULES:
            last = self.per_activation and size.name.startswith("5")
            own = functools.partial(conv, per_activation=last)
            x = InceptionModule(size, self.width, own, name=f"module_{size.name}")(
                x, train=train
            )
        return classify(
            x.mean((1, 2)),
            self.classes,
            train=train,
            dropout=self.dropout,
            param_dtype=self.param_dtype,
        )


def _pool(x: jax.Array, kind: str, stride: int) -> jax.Array:
    """Pool 3x3 pixels; a mean counts only pixels inside the map."""
    if kind == "avg":
        window, strides = (3, 3), (stride, stride)
        return nn.avg_pool(x, window, strides, "SAME", count_include_pad=False)
    # Columns first, then rows: on a CPU the derivative takes half the time.
    x = nn.max_pool(x, (3, 1), (stride, 1), "SAME")
    return nn.max_pool(x, (1, 3), (1, stride), "SAME")
