"""What the convolutional networks are made of."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax.models.normalization import Normalization

Padding = Literal["SAME", "VALID"] | int


class ConvNorm(nn.Module):
    r"""A convolution, normalized before its nonlinearity.

    .. math:: z = g(\mathrm{BN}(W * u) + r)

    The bias of the convolution is dropped, since the shift of BN takes its place;
    without normalization it returns. Parameters are called `conv` and `bn`, and
    `depthwise` where the convolution is separable.

    Args:
        features: channels of the output.
        kernel: height and width of the filters.
        stride: of the filters, down and across.
        padding: "SAME" and "VALID" as in TensorFlow; or pixels on every side.
        depth_multiplier: where given, filters of the full size act on each channel by
            itself, so many on each, and 1x1 filters join them; nothing in between.
        normalization: what stands before the nonlinearity.
        activation: a name of `jax.nn`; "identity" for none.
        kernel_init: of the filters.
        zero_scale: start the scale of BN at 0.
        per_activation: see `Normalization.__call__`.
        dtype: of the computation; that of input and parameters if None.
        param_dtype: of the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = ConvNorm(8, 3, normalization=Normalization(), activation="relu")
        >>> x = jnp.ones((2, 5, 5, 4))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'bn': {'bias': (8,), 'scale': (8,)}, 'conv': {'kernel': (3, 3, 4, 8)}}

    References:
        Ioffe and Szegedy 2015, section 3.2.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: Padding = "SAME"
    depth_multiplier: int | None = None
    normalization: Normalization = Normalization()
    activation: str = "relu"
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    zero_scale: bool = False
    per_activation: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, residual: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        """Return the activations, shape (batch, height', width', features).

        Args:
            x: shape (batch, height, width, channels).
            residual: added before the nonlinearity; shape of the output.
            train: normalize by the batch and update the running statistics.
        """
        options: dict[str, Any] = {
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        size: Sequence[int] = (self.kernel, self.kernel)
        stride = self.stride
        padding = self.padding
        if self.depth_multiplier is not None:
            channels = x.shape[-1]
            x = nn.Conv(
                channels * self.depth_multiplier,
                size,
                stride,
                padding,
                feature_group_count=channels,
                use_bias=False,
                name="depthwise",
                **options,
            )(x)
            size, stride, padding = (1, 1), 1, "VALID"
        x = nn.Conv(
            self.features,
            size,
            stride,
            padding,
            use_bias=self.normalization.needs_bias,
            name="conv",
            **options,
        )(x)
        return self.normalization(
            x,
            train=train,
            activation=self.activation,
            name="bn",
            residual=residual,
            zero_scale=self.zero_scale,
            per_activation=self.per_activation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


def convolution_init(weight_scale: float) -> nn.initializers.Initializer:
    """Return He's initializer, its standard deviation times `weight_scale`.

    References:
        He et al. 2015, "Delving deep into rectifiers", section 2.2.
    """
    return nn.initializers.variance_scaling(
        2.0 * weight_scale**2, "fan_in", "truncated_normal"
    )


def scaled(features: int, width: float) -> int:
    """Return `features` times `width`: the nearest multiple of 4, at least 4.

    Example:
        >>> scaled(96, 0.125), scaled(64, 0.1), scaled(64, 0.01), scaled(6, 1.0)
        (12, 8, 4, 6)
    """
    if width == 1:
        return features
    return max(4, 4 * int(features * width / 4 + 0.5))


def check_width(model: str, width: float) -> None:
    """Refuse a width multiplier that is not positive."""
    if not 0 < width < math.inf:
        raise ValueError(
            f"{model}: width={width}; expected a positive number, such as 0.5 for half "
            "as many channels."
        )


def check_images(model: str, images: jax.Array, smallest: int = 1) -> None:
    """Refuse what is no batch of images of at least `smallest` pixels a side."""
    if images.ndim != 4 or min(images.shape[1:3]) < smallest:
        raise ValueError(
            f"{model}: images of shape {images.shape}; expected (batch, height, width, "
            f"channels), height and width {smallest} or more."
        )
