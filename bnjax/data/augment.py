"""Augmentation on the host: random crops and colours of images of any size.

Each function draws from the generator it is given and from nothing else.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

# ITU-R BT.601: what grey a colour is.
LUMA = (0.299, 0.587, 0.114)
# The columns are grey and two axes of colour; a rotation of the two is one of hue.
_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_RGB = np.linalg.inv(_YIQ)
_GREY = np.tile(LUMA, (3, 1))
_SAME = np.eye(3)
ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_area_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a part of an image by its share of the area and its aspect ratio.

    The share is uniform; the logarithm of width over height is uniform; the place is
    uniform. A draw that does not fit is drawn again; after `ATTEMPTS`, the largest
    central part with an aspect ratio in range is taken.

    Args:
        rng: drawn from.
        height: of the image.
        width: of the image.
        area: smallest and largest share of the image's area.
        aspect: smallest and largest width over height.

    Returns:
        A box within the image, at least one pixel wide and high.

    Example:
        >>> box = random_area_box(np.random.default_rng(0), 100, 80)
        >>> 0 <= box.top <= 100 - box.height and 0 <= box.left <= 80 - box.width
        True

    References:
        Szegedy et al. 2015 (GoogLeNet), section 6.
    """
    for _ in range(ATTEMPTS):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_height = max(1, round(math.sqrt(target / ratio)))
        box_width = max(1, round(math.sqrt(target * ratio)))
        if box_height <= height and box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return Box(top, left, box_height, box_width)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box_height = max(1, min(height, round(width / ratio)))
    box_width = max(1, min(width, round(height * ratio)))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return Box(top, left, box_height, box_width)


def color_transform(
    mean: np.ndarray,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    order: tuple[int, ...] = (0, 1, 2, 3),
) -> np.ndarray:
    r"""Compose four distortions of colour into one affine map.

    .. math:: x \mapsto x + b, \quad x \mapsto \bar x + c (x - \bar x), \quad
              x \mapsto g(x) + s (x - g(x)), \quad x \mapsto R_h x

    with :math:`\bar x` the image's mean colour at that point, g its grey, and
    :math:`R_h` a rotation by h turns about the grey axis. Nothing is cut off between
    them.

    Args:
        mean: the image's mean colour, shape (3,).
        brightness: added, in the image's units.
        contrast: 1 changes nothing.
        saturation: 1 changes nothing, 0 gives greys.
        hue: of a full turn; 0 changes nothing.
        order: of brightness (0), contrast (1), saturation (2), hue (3).

    Returns:
        The matrix and, as its last column, the offset: shape (3, 4).

    Example:
        >>> color_transform(
        ...     np.zeros(3), brightness=0, contrast=1, saturation=1, hue=0
        ... ).round(12).tolist()[0]
        [1.0, 0.0, 0.0, 0.0]
    """
    angle = 2 * math.pi * hue
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    parts = (
        _SAME,
        contrast * _SAME,
        saturation * _SAME + (1 - saturation) * _GREY,
        _RGB @ turn @ _YIQ,
    )
    matrix, offset = _SAME, np.zeros(3)
    for which in order:
        shift = np.zeros(3)
        if which == 0:
            shift += brightness
        elif which == 1:
            shift += (1 - contrast) * (matrix @ mean + offset)
        matrix, offset = parts[which] @ matrix, parts[which] @ offset + shift
    return np.column_stack([matrix, offset])


def distort_colors(
    image: np.ndarray, rng: np.random.Generator, strength: float = 1.0
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue at random, in a random order.

    The paper distorts less than GoogLeNet did, whose ranges (after Howard 2013) are
    unpublished. Those here are a common stand-in: at strength 1, brightness within
    32 of 255, contrast and saturation from 0.5 to 1.5, hue within 0.2 of a turn.

    Args:
        image: uint8, shape (height, width, 3).
        rng: drawn from.
        strength: all four ranges are narrowed to this share; 0 gives the image back.

    Returns:
        uint8, of the same shape.
    """
    import cv2

    if strength == 0:
        return image
    matrix = color_transform(
        np.array(cv2.mean(image)[:3]),
        brightness=strength * rng.uniform(-32, 32),
        contrast=1 + strength * rng.uniform(-0.5, 0.5),
        saturation=1 + strength * rng.uniform(-0.5, 0.5),
        hue=strength * rng.uniform(-0.2, 0.2),
        order=tuple(rng.permutation(4)),
    )
    return cv2.transform(image, matrix)


class HostTransform(Protocol):
    """Makes a stored image one of the size that the model is given."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 of shape (size, size, channels)."""
        ...


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part, resized by a random interpolation, mirrored, its colours changed.

    Args:
        size: height and width of the result.
        area: see `random_area_box`.
        aspect: see `random_area_box`.
        flip: mirror every other image, at random.
        strength: see `distort_colors`; images of one channel have no colours.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    strength: float = 1.0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 of shape (size, size, channels)."""
        import cv2

        height, width = image.shape[:2]
        box = random_area_box(rng, height, width, self.area, self.aspect)
        part = image[box.top : box.top + box.height, box.left : box.left + box.width]
        kinds = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
        kind = kinds[rng.integers(len(kinds))]
        result = cv2.resize(part, (self.size, self.size), interpolation=kind)
        if self.flip and rng.integers(2):
            result = cv2.flip(result, 1)
        if image.shape[2:] == (3,):
            result = distort_colors(result, rng, self.strength)
        return result.reshape(self.size, self.size, *image.shape[2:])


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize as evaluations do: to smaller by areas, to larger by a cubic.

    Args:
        image: uint8, shape (rows, columns) or (rows, columns, channels).
        height: of the result.
        width: of the result.

    Returns:
        uint8, of shape (height, width) or (height, width, channels).

    Example:
        >>> image = np.array([[10, 20, 90, 70], [10, 40, 30, 10]], np.uint8)
        >>> resized(image, 1, 2).tolist()
        [[20, 50]]
    """
    import cv2

    kind = cv2.INTER_AREA if height < len(image) else cv2.INTER_CUBIC
    result = cv2.resize(image, (width, height), interpolation=kind)
    return result.reshape(height, width, *image.shape[2:])


@dataclasses.dataclass(frozen=True)
class CentralCrop:
    """The middle of an image, as evaluations see it.

    Args:
        size: height and width of the result.
        share: of the shorter side that is kept; 0.875 is 224 of 256.
    """

    size: int
    share: float = 0.875

    def __call__(
        self,
        image: np.ndarray,
        rng: np.random.Generator | None = None,  # noqa: ARG002
    ) -> np.ndarray:
        """Return uint8 of shape (size, size, channels); nothing is drawn."""
        height, width = image.shape[:2]
        side = max(1, round(self.share * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        part = image[top : top + side, left : left + side]
        return resized(part, self.size, self.size)


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
