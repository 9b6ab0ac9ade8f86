"""The building blocks of the networks."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax.models.normalization import Normalization

Padding = Literal["SAME", "VALID"] | int


class ConvNorm(nn.Module):
    r"""A convolution that is normalized before its nonlinearity.

    $$z = g(\mathrm{BN}(W * u) + r)$$

    The shift of BN replaces the bias of the convolution; without normalization, the
    convolution has a bias. The parameters are `conv` and `bn`, and also `depthwise` if
    the convolution is separable. The other attributes are described in `bnjax.models`.

    Attributes:
        features: the number of filters.
        kernel: the height and width of the filters.
        stride: the stride of the filters.
        padding: "SAME" or "VALID" as in TensorFlow, or the number of pixels on every
            side.
        depth_multiplier: make the convolution separable: this number of full-size
            filters acts on each channel, and 1x1 filters join the results, with nothing
            in between.
        kernel_init: the initializer of the filters.
        zero_scale: start the scale of BN at 0.
        per_activation: see `Normalization.__call__`.

    References:
        Ioffe & Szegedy (2015), section 3.2.
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
        """Return the activations, shape (batch, new height, new width, features).

        A residual of the same shape is added before the nonlinearity.
        """
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(nn.Conv, kernel_init=self.kernel_init, **dtypes)
        use_bias = self.normalization.needs_bias
        size = (self.kernel, self.kernel), self.stride, self.padding
        if self.depth_multiplier is not None:
            channels = x.shape[-1]
            x = conv(
                channels * self.depth_multiplier,
                *size,
                feature_group_count=channels,
                use_bias=False,
                name="depthwise",
            )(x)
            size = (1, 1), 1, "VALID"
        x = conv(self.features, *size, use_bias=use_bias, name="conv")(x)
        return self.normalization(
            x,
            train=train,
            activation=self.activation,
            name="bn",
            residual=residual,
            zero_scale=self.zero_scale,
            per_activation=self.per_activation,
            **dtypes,
        )


def classify(
    features: jax.Array,
    classes: int,
    *,
    train: bool,
    param_dtype: Any,
    dropout: float = 0.0,
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
) -> jax.Array:
    """Return logits from a linear layer with the name "logits".

    Call it inside the compact method of a module: it adds the layer to that module. The
    layer computes in float32 or wider, whatever the dtype of the layers before it.

    Args:
        features: the input, shape (batch, n).
        classes: the number of logits.
        train: whether dropout is active.
        param_dtype: the dtype of the parameters.
        dropout: the dropout rate of the features in training.
        kernel_init: the initializer of the weights.

    Returns:
        The logits, shape (batch, classes).
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    features = nn.Dropout(dropout, deterministic=not train)(features)
    return nn.Dense(
        classes, kernel_init=kernel_init, param_dtype=param_dtype, name="logits"
    )(features)


def local_response_normalization(
    x: jax.Array,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> jax.Array:
    r"""Divide each value by the energy of its channel and of neighboring channels.

    $$
    y_c = x_c \Big/ \Big(k + \frac{\alpha}{n}
    \sum_{\lvert c' - c \rvert \le n/2} x_{c'}^2\Big)^\beta
    $$

    Channels before the first and after the last count as 0. The computation is in
    float32 or wider.

    Args:
        x: an array of shape (..., channels).
        size: $n$, an odd number of channels.
        alpha: $\alpha$, the weight of the mean square; it is divided by $n$, as in
            Caffe.
        beta: $\beta$, the exponent.
        k: $k$, the number added to the energy.

    Returns:
        The normalized array.

    References:
        Krizhevsky, Sutskever & Hinton (2012), section 3.3; the defaults are those of
        GoogLeNet's public model.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(
            f"local_response_normalization: size={size}; expected an odd number of "
            "channels, such as 5."
        )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    channels, reach = x.shape[-1], size // 2
    beyond = [(0, 0)] * (x.ndim - 1) + [(reach, reach)]
    squares = jnp.pad(jnp.square(wide), beyond)
    # XLA fuses these few slices, and their derivative, into one pass.
    energy = sum(squares[..., i : i + channels] for i in range(size))
    return (wide * (k + alpha / size * energy) ** -beta).astype(x.dtype)


def convolution_init(weight_scale: float) -> nn.initializers.Initializer:
    """Return He's initializer with its standard deviation times `weight_scale`.

    References:
        He et al. (2015), "Delving deep into rectifiers", section 2.2.
    """
    return nn.initializers.variance_scaling(
        2.0 * weight_scale**2, "fan_in", "truncated_normal"
    )


def scaled(features: int, width: float) -> int:
    """Return `features` times `width`, as the nearest multiple of 4 and at least 4."""
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


def check_choice(option: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a value that is not one of the known values."""
    if value not in known:
        raise ValueError(f"{option}={value!r}; expected one of {', '.join(known)}.")


def check_images(model: str, images: jax.Array, smallest: int = 1) -> None:
    """Refuse an array that is not a batch of images of at least `smallest` pixels."""
    if images.ndim != 4 or min(images.shape[1:3]) < smallest:
        raise ValueError(
            f"{model}: images of shape {images.shape}; expected (batch, height, width, "
            f"channels), height and width {smallest} or more."
        )
