"""The fully connected network of the paper's MNIST experiment."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax.models.layers import classify
from bnjax.models.normalization import Normalization


class MLP(nn.Module):
    r"""Hidden layers of sigmoids, each normalized before its nonlinearity.

    $$
    z_l = \sigma(\mathrm{BN}(W_l z_{l-1})), \quad \mathrm{logits} = W z_L + b
    $$

    A normalized layer has no bias, because the shift of BN replaces it. Without
    normalization, the layer has a bias. The other attributes are described in
    `bnjax.models`.

    Attributes:
        hidden: the width of each hidden layer.
        weight_std: the standard deviation of the Gaussian initial weights.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.models import MLP
        >>> variables = MLP().init(jax.random.key(0), jnp.zeros((1, 8, 8)), train=False)
        >>> sorted(variables["batch_stats"])
        ['bn_0', 'bn_1', 'bn_2']
        >>> variables["params"]["dense_0"]["kernel"].shape
        (64, 100)

    References:
        Ioffe & Szegedy (2015), section 4.1 (it does not state the standard deviation).
    """

    hidden: Sequence[int] = (100, 100, 100)
    classes: int = 10
    weight_std: float = 0.01
    normalization: Normalization = Normalization()
    activation: str = "sigmoid"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits of images of any shape, which the model flattens."""
        kernel_init = nn.initializers.normal(self.weight_std)
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, kernel_init=kernel_init, **dtypes)
        use_bias = self.normalization.needs_bias
        z = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.hidden):
            z = dense(width, use_bias=use_bias, name=f"dense_{i}")(z)
            z = self.normalization(
                z, train=train, activation=self.activation, name=f"bn_{i}", **dtypes
            )
        return classify(
            z,
            self.classes,
            train=train,
            kernel_init=kernel_init,
            param_dtype=self.param_dtype,
        )
