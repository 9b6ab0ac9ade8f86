"""Augmentation of small images of one size, on the device: shift and mirror."""

import jax
import jax.numpy as jnp


def shift_and_mirror(
    images: jax.Array, keys: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
    """Pad each image with zeros, cut the old size out at a random place, mirror half.

    Args:
        images: shape (batch, height, width) or (batch, height, width, channels).
        keys: one random key an image, shape (batch,).
        padding: pixels on each side; an image moves by at most as many.
        flip: mirror every other image, at random.

    Returns:
        Images of the same shape and dtype.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
        >>> shift_and_mirror(images, keys, padding=0).tolist() == images.tolist()
        True

    References:
        He et al. 2016 (ResNet), section 4.2, for CIFAR-10.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        place, mirror = jax.random.split(key)
        around = [(padding, padding)] * 2 + [(0, 0)] * (image.ndim - 2)
        start = jax.random.randint(place, (2,), 0, 2 * padding + 1)
        rest = [jnp.zeros((), start.dtype)] * (image.ndim - 2)
        cut = jax.lax.dynamic_slice(
            jnp.pad(image, around), [*start, *rest], image.shape
        )
        return jnp.where(flip & jax.random.bernoulli(mirror), cut[:, ::-1], cut)

    return jax.vmap(one)(images, keys)
