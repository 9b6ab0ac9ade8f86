"""LeNet with batch normalization before each nonlinearity."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax.models.layers import ConvNorm, check_choice, check_images, classify
from bnjax.models.normalization import Normalization

Pool = Literal["avg", "max"]


class LeNet(nn.Module):
    """Two convolutions and two hidden layers, each normalized before its nonlinearity.

    The layers are: convolution 5x5 to 6 channels, pooling 2x2, convolution 5x5 to 16
    channels, pooling 2x2, layers of 120 and 84 features, logits. The convolutions have
    no padding: for images of 28x28 pixels, 4x4x16 = 256 features reach the first hidden
    layer. The other attributes are described in `bnjax.models`.

    Attributes:
        pool: the pooling of 2x2 pixels.
        weight_scale: a factor on Glorot's standard deviation of the weights before each
            nonlinearity.

    References:
        LeCun et al. (1998); with batch normalization: Zhang et al., "Dive into Deep
        Learning", section "Batch Normalization".
    """

    classes: int = 10
    pool: Pool = "avg"
    normalization: Normalization = Normalization()
    activation: str = "sigmoid"
    weight_scale: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits."""
        check_images("LeNet", images, smallest=16)
        check_choice("LeNet: pool", self.pool, get_args(Pool))
        pool = nn.max_pool if self.pool == "max" else nn.avg_pool
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel_init = nn.initializers.variance_scaling(
            self.weight_scale**2, "fan_avg", "truncated_normal"
        )
        x = images
        for i, features in enumerate((6, 16), start=1):
            x = ConvNorm(
                features,
                5,
                padding="VALID",
                normalization=self.normalization,
                activation=self.activation,
                kernel_init=kernel_init,
                name=f"conv{i}",
                **dtypes,
            )(x, train=train)
            x = pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate((120, 84), start=1):
            x = nn.Dense(
                features,
                use_bias=self.normalization.needs_bias,
                kernel_init=kernel_init,
                name=f"dense{i}",
                **dtypes,
            )(x)
            x = self.normalization(
                x, train=train, activation=self.activation, name=f"bn{i}", **dtypes
            )
        return classify(
            x,
            self.classes,
            train=train,
            kernel_init=nn.initializers.glorot_normal(),
            param_dtype=self.param_dtype,
        )
