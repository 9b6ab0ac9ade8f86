"""Residual networks for images of 32x32 and 224x224."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax.models.layers import (
    ConvNorm,
    check_images,
    check_width,
    classify,
    convolution_init,
    scaled,
)
from bnjax.models.normalization import Normalization


class ResNetSize(NamedTuple):
    """The number of blocks in each stage; four stages are for images of 224x224.

    Every stage except the first halves height and width.

    Attributes:
        blocks: the number of blocks in each stage.
        bottleneck: whether blocks have convolutions of 1x1, 3x3 and 1x1 with four times
            the features; otherwise they have two of 3x3.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False


SIZES = {
    20: ResNetSize((3, 3, 3)),
    56: ResNetSize((9, 9, 9)),
    110: ResNetSize((18, 18, 18)),
    18: ResNetSize((2, 2, 2, 2)),
    34: ResNetSize((3, 4, 6, 3)),
    50: ResNetSize((3, 4, 6, 3), bottleneck=True),
    101: ResNetSize((3, 4, 23, 3), bottleneck=True),
    152: ResNetSize((3, 8, 36, 3), bottleneck=True),
}
"""The residual networks by depth."""


class Block(nn.Module):
    """Two 3x3 convolutions; the input is added before the last nonlinearity.

    If the shape changes, the shortcut keeps every second pixel and adds channels of 0,
    without parameters. With `project`, it is a 1x1 convolution and BN instead.

    Attributes:
        features: the number of filters.
        stride: the stride of the first convolution.
        zero_scale: start the scale of the last BN at 0, and so the block as the
            identity.
        conv: a function that makes a `ConvNorm`.
        project: whether the shortcut is a convolution if the shape changes.

    References:
        He et al. (2016), "Deep residual learning", section 4.2, option A; with
        projections, section 4.1, option B.
    """

    features: int
    stride: int
    zero_scale: bool
    conv: Any
    project: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return shape (batch, height / stride, width / stride, features)."""
        if self.project:
            shortcut = _project(self.conv, x, self.features, self.stride, train)
        else:
            shortcut = x[:, :: self.stride, :: self.stride]
            new = self.features - x.shape[-1]
            shortcut = jnp.pad(shortcut, [(0, 0)] * 3 + [(new // 2, new - new // 2)])
        conv = functools.partial(self.conv, self.features, 3, padding=1)
        x = conv(stride=self.stride, name="conv1")(x, train=train)
        last = conv(zero_scale=self.zero_scale, name="conv2")
        return last(x, residual=shortcut.astype(x.dtype), train=train)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 with a shortcut around them.

    The input is added before the last nonlinearity. If the shape changes, the shortcut
    is a 1x1 convolution and BN. The stride is on the 3x3, as in torchvision; in the
    paper it is on the first 1x1.

    Attributes:
        features: the number of filters of the 3x3; the output has four times as many.
        stride: the stride of the 3x3.
        zero_scale: start the scale of the last BN at 0, and so the block as the
            identity.
        conv: a function that makes a `ConvNorm`.

    References:
        He et al. (2016), "Deep residual learning", section 4.1, option B.
    """

    features: int
    stride: int
    zero_scale: bool
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return shape (batch, height / stride, width / stride, 4 x features)."""
        wide = 4 * self.features
        shortcut = _project(self.conv, x, wide, self.stride, train)
        x = self.conv(self.features, 1, name="conv1")(x, train=train)
        x = self.conv(self.features, 3, self.stride, padding=1, name="conv2")(
            x, train=train
        )
        last = self.conv(wide, 1, zero_scale=self.zero_scale, name="conv3")
        return last(x, residual=shortcut.astype(x.dtype), train=train)


def _project(
    conv: Any, x: jax.Array, features: int, stride: int, train: bool
) -> jax.Array:
    """Return a block's input, after a 1x1 convolution if the shape changes."""
    if x.shape[-1] == features and stride == 1:
        return x
    project = conv(features, 1, stride, activation="identity", name="projection")
    return project(x, train=train)


class ResNet(nn.Module):
    r"""A residual network for images of 32x32, or of 224x224 as in torchvision.

    $$z' = g(\mathrm{BN}(F(z)) + z)$$

    Networks of 20, 56 or 110 layers are for 32x32; networks of 18, 34, 50, 101 or 152
    layers are for 224x224. The other attributes are described in `bnjax.models`.

    Attributes:
        depth: a key of `SIZES`.
        zero_scale: start the scale of the last BN of each block at 0, so that each
            block starts as the identity.
        weight_scale: a factor on He's standard deviation of the convolutions.

    References:
        He et al. (2016), "Deep residual learning for image recognition"; for the zero
        scale, Goyal et al. (2017), section 5.1.
    """

    depth: int
    classes: int = 1000
    width: float = 1.0
    zero_scale: bool = False
    dropout: float = 0.0
    normalization: Normalization = Normalization()
    activation: str = "relu"
    weight_scale: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits."""
        if self.depth not in SIZES:
            known = ", ".join(map(str, sorted(SIZES)))
            raise ValueError(f"ResNet: depth={self.depth}; expected one of {known}.")
        if self.zero_scale and self.normalization.kind == "none":
            raise ValueError(
                'ResNet: zero_scale=True with normalization of kind "none", which has '
                "no scale; expected another normalization, or zero_scale=False."
            )
        check_images("ResNet", images)
        check_width("ResNet", self.width)
        size = SIZES[self.depth]
        large = len(size.blocks) == 4
        widths = (64, 128, 256, 512) if large else (16, 32, 64)
        conv = functools.partial(
            ConvNorm,
            normalization=self.normalization,
            activation=self.activation,
            kernel_init=convolution_init(self.weight_scale),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        first = scaled(widths[0], self.width)
        if large:
            x = conv(first, 7, 2, padding=3, name="conv1")(images, train=train)
            padding: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), (2, 2), padding)
        else:
            x = conv(first, 3, padding=1, name="conv1")(images, train=train)
        block: Any = functools.partial(Block, project=large)
        block = Bottleneck if size.bottleneck else block
        for stage, blocks in enumerate(size.blocks, start=1):
            features = scaled(widths[stage - 1], self.width)
            for i in range(blocks):
                stride, name = 2 if stage > 1 and i == 0 else 1, f"block{i + 1}"
                x = block(
                    features, stride, self.zero_scale, conv, name=f"stage{stage}_{name}"
                )(x, train=train)
        return classify(
            x.mean((1, 2)),
            self.classes,
            train=train,
            dropout=self.dropout,
            param_dtype=self.param_dtype,
        )
