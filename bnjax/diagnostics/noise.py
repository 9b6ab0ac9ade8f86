"""Noise after batch normalization, as in Santurkar et al. (2018)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from bnjax import _validate


def batch_noise(
    key: jax.Array,
    x: jax.Array,
    *,
    axis: _validate.Axes | None = None,
    max_mean: float = 0.5,
    max_scale: float = 1.25,
    mean_spread: float = 0.1,
    scale_spread: float = 0.1,
) -> jax.Array:
    r"""Scale and shift each value by noise from a random distribution.

    $$
    \mu \sim U(-0.5, 0.5), \quad \sigma \sim U(1, 1.25) \\
    m \sim U(\mu - 0.1, \mu + 0.1), \quad s \sim N(\sigma, 0.1^2), \quad y = s x + m
    $$

    A call draws one $\mu$ and $\sigma$, and an $m$ and $s$ for each value. After batch
    normalization in training, with a new key in each step, the noise changes the input
    distribution of the next layer at every step: it adds covariate shift on purpose.
    The noise is float32, or float64 if `x` is float64.

    Args:
        key: a key of `jax.random`.
        x: an array of any shape and any floating dtype.
        axis: the feature axis or axes; each channel then draws its own $\mu$ and
            $\sigma$. None draws one for the layer.
        max_mean: the range of $\mu$ is from -max_mean to max_mean.
        max_scale: the range of $\sigma$ is from 1 to max_scale.
        mean_spread: the largest difference of $m$ from $\mu$.
        scale_spread: the standard deviation of $s$.

    Returns:
        The noisy values, with the shape and dtype of `x`.

    Raises:
        TypeError: if `x` is an integer array.
        ValueError: if a range is negative, or `max_scale` is below 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import batch_noise
        >>> exact = {"max_mean": 0, "max_scale": 1, "mean_spread": 0, "scale_spread": 0}
        >>> print(batch_noise(jax.random.key(0), jnp.array([1.0, 2.0]), **exact))
        [1. 2.]

    References:
        Santurkar et al. (2018), "How Does Batch Normalization Help Optimization?",
        section 2.1 and the algorithm of the appendix.
    """
    for name, value, lowest in (
        ("max_mean", max_mean, 0),
        ("max_scale", max_scale, 1),
        ("mean_spread", mean_spread, 0),
        ("scale_spread", scale_spread, 0),
    ):
        if not value >= lowest:
            raise ValueError(
                f"batch_noise: {name}={value}; expected a number of {lowest} or more."
            )
    with _validate.naming("batch_noise"):
        x = _validate.as_input(x)
        features = () if axis is None else _validate.split_axes(x.shape, axis)[0]
    wide = _validate.promoted(x.dtype, jnp.float32)
    dtype = jnp.finfo(wide).dtype  # The noise of complex inputs is real.
    shape = [n if i in features else 1 for i, n in enumerate(x.shape)]
    keys = jax.random.split(key, 4)
    mean = max_mean * jax.random.uniform(keys[0], shape, dtype, -1, 1)
    scale = 1 + (max_scale - 1) * jax.random.uniform(keys[1], shape, dtype)
    mean = mean + mean_spread * jax.random.uniform(keys[2], x.shape, dtype, -1, 1)
    scale = scale + scale_spread * jax.random.normal(keys[3], x.shape, dtype)
    return (scale * x.astype(wide) + mean).astype(x.dtype)


class BatchNoise(nn.Module):
    """`batch_noise` as a layer of flax.linen, without variables.

    Place it after BatchNorm and before the nonlinearity. In training the call needs
    `rngs={"noise": key}`, with a new key in each step. The other attributes are those
    of `batch_noise`.

    Attributes:
        deterministic: return the input unchanged, as in evaluation. It may be given
            here or to the call.
        rng_collection: the rng stream of the key.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import BatchNoise
        >>> layer, rngs = BatchNoise(), {"noise": jax.random.key(0)}
        >>> layer.apply({}, jnp.ones((4, 3)), deterministic=False, rngs=rngs).shape
        (4, 3)
    """

    axis: _validate.Axes | None = None
    max_mean: float = 0.5
    max_scale: float = 1.25
    mean_spread: float = 0.1
    scale_spread: float = 0.1
    deterministic: bool | None = None
    rng_collection: str = "noise"

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Return `x` with noise, or as it is."""
        deterministic = nn.merge_param(
            "deterministic", self.deterministic, deterministic
        )
        if deterministic:
            return x
        return batch_noise(self.make_rng(self.rng_collection), x, **_options(self))


class NnxBatchNoise(nnx.Module):
    """`batch_noise` as a layer of flax.nnx; see `BatchNoise`.

    The other arguments are those of `batch_noise`.

    Args:
        rngs: the rng streams. Each call in training uses a key of the stream "noise",
            or of the default stream.
        deterministic: return the input unchanged; `train()` and `eval()` set it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.diagnostics import NnxBatchNoise
        >>> layer = NnxBatchNoise(rngs=nnx.Rngs(noise=0))
        >>> layer(jnp.ones((4, 3))).shape
        (4, 3)
    """

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        deterministic: bool = False,
        axis: _validate.Axes | None = None,
        max_mean: float = 0.5,
        max_scale: float = 1.25,
        mean_spread: float = 0.1,
        scale_spread: float = 0.1,
    ):
        self.deterministic = deterministic
        self.axis = axis
        self.max_mean, self.max_scale = max_mean, max_scale
        self.mean_spread, self.scale_spread = mean_spread, scale_spread
        self.rngs = rngs["noise"].fork()

    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Return `x` with noise, or as it is."""
        if self.deterministic if deterministic is None else deterministic:
            return x
        return batch_noise(self.rngs(), x, **_options(self))


def _options(layer: Any) -> dict[str, Any]:
    names = ("axis", "max_mean", "max_scale", "mean_spread", "scale_spread")
    return {name: getattr(layer, name) for name in names}
