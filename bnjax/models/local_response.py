"""Local response normalization, which batch normalization made unnecessary."""

import jax
import jax.numpy as jnp


def local_response_normalization(
    x: jax.Array,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> jax.Array:
    r"""Divide each value by the energy of its channel and the channels beside it.

    .. math:: y_c = x_c \Big/ \Big(k + \frac{\alpha}{n} \sum_{|c' - c| \le n/2}
              x_{c'}^2\Big)^\beta

    Channels beyond the first and the last count as 0. Computed in float32 or wider.

    Args:
        x: shape (..., channels).
        size: n, an odd number of channels.
        alpha: weight of the mean square; divided by n, as in Caffe.
        beta: the exponent.
        k: added to the energy.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: `size` is even or not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([1.0, 0.0, 2.0, 2.0])
        >>> print(local_response_normalization(x, size=3, alpha=3.0, beta=1.0))
        [0.5        0.         0.22222222 0.22222222]

    References:
        Krizhevsky, Sutskever and Hinton 2012, section 3.3; the defaults are those of
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
    # A few slices: XLA fuses them, and their derivative, into one pass.
    energy = sum(squares[..., i : i + channels] for i in range(size))
    return (wide * (k + alpha / size * energy) ** -beta).astype(x.dtype)
