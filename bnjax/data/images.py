"""Read, decode, resize and augment one image.

All randomness comes from the given generator or key.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.data.config import AugmentConfig, DataError

ATTEMPTS = 10
# The rows are gray (ITU-R BT.601) and two color axes; rotating these rotates the hue.
_YIQ = np.array(
    [(0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)]
)
_YIQ_INVERSE = np.linalg.inv(_YIQ)
_GREY = np.tile(_YIQ[0], (3, 1))
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class ImageError(DataError):
    """An image cannot be read; the message is a predicate such as "is truncated"."""


def decode_image(
    encoded: bytes, channels: int, *, max_pixels: int = 2**27, apply_exif: bool = False
) -> np.ndarray:
    """Decode a JPEG, PNG, BMP, GIF, TIFF or WebP to (height, width, channels).

    The name of the file does not matter. Bytes after the end of the image are ignored,
    because phones append videos. `channels` is 1 (gray) or 3. With `apply_exif`, the
    image is rotated by its EXIF orientation.

    Args:
        encoded: the bytes of the file.
        channels: 1 or 3.
        max_pixels: the largest height times width.
        apply_exif: rotate the image by its EXIF orientation.

    Returns:
        The image, uint8.

    Raises:
        ImageError: if the image is damaged, too large, or of another format.
    """
    import cv2

    height, width = _image_size(encoded)
    if height * width > max_pixels:
        raise ImageError(
            f"has {height:,} x {width:,} pixels, more than --data.max-pixels "
            f"{max_pixels}, and is not decoded"
        )
    kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    if not apply_exif:
        kind |= cv2.IMREAD_IGNORE_ORIENTATION
    with contextlib.suppress(cv2.error):
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), kind)
        if image is not None:
            return image.reshape(*image.shape[:2], channels)
    raise ImageError("cannot be decoded")


def _image_size(encoded: bytes) -> tuple[int, int]:
    """Return height and width from the header, after a search for the image's end.

    A decoder may fill a truncated JPEG or PNG with gray; the decoders of the other
    formats refuse a truncated file. Reading the markers takes a fraction of the time of
    decoding.
    """
    if encoded.startswith(b"\xff\xd8"):
        return _jpeg_size(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_size(encoded)
    from PIL import Image

    try:
        # Only formats of Pillow that OpenCV reads too.
        formats = ("BMP", "GIF", "TIFF", "WEBP")
        with Image.open(io.BytesIO(encoded), formats=formats) as image:
            return image.height, image.width
    except Exception as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        many = "has more pixels than Pillow opens, whatever --data.max-pixels is"
        raise ImageError(many if bomb else "cannot be decoded") from error


def _jpeg_size(encoded: bytes) -> tuple[int, int]:
    """Follow the markers to the end of the image; thumbnails are inside segments."""
    size, place = None, 2
    while found := _JPEG_MARKER.search(encoded, place):
        place = found.end()
        marker = encoded[place - 1]
        if marker == 0xD9 and size:
            return size
        if marker in (0x01, 0xD8, 0xD9):
            continue
        if marker in _JPEG_FRAMES and not size:
            height, width = encoded[place + 3 : place + 5], encoded[place + 5 :][:2]
            size = int.from_bytes(height), int.from_bytes(width)
            # Most files end here. Search for the end only if more bytes follow.
            if encoded.endswith(b"\xff\xd9"):
                return size
        place += int.from_bytes(encoded[place : place + 2])
    raise ImageError("is truncated")


def _png_size(encoded: bytes) -> tuple[int, int]:
    place = 8
    while place + 8 <= len(encoded):
        if encoded[place + 4 : place + 8] == b"IEND":
            return int.from_bytes(encoded[20:24]), int.from_bytes(encoded[16:20])
        place += 12 + int.from_bytes(encoded[place : place + 4])
    raise ImageError("is truncated")


def read_file(path: Path, max_bytes: int = 2**30) -> bytes:
    """Return the content of a regular file, or of a link to a regular file.

    Reading a named pipe could wait forever, and a device may have no end.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is not a regular file")
        if status.st_size > max_bytes:
            raise ImageError(f"has {status.st_size:,} bytes, more than {max_bytes:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from error


def printable(path: Path | str) -> str:
    """Return a path as text that any stream accepts, whatever its bytes are."""
    return os.fsencode(path).decode(errors="backslashreplace")


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image as in evaluation, by areas to shrink, by cubics to enlarge."""
    import cv2

    kind = cv2.INTER_AREA if height < len(image) else cv2.INTER_CUBIC
    result = cv2.resize(image, (width, height), interpolation=kind)
    return result.reshape(height, width, *image.shape[2:])


@dataclasses.dataclass(frozen=True)
class CentralCrop:
    """Crop the center of an image; `share` of the shorter side stays, as 224 of 256."""

    size: int
    share: float = 0.875

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return an image of `size` by `size` pixels."""
        height, width = image.shape[:2]
        side = max(1, round(self.share * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        part = image[top : top + side, left : left + side]
        return resized(part, self.size, self.size)


class Box(NamedTuple):
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
    """Return a random part of an image, with random area, aspect ratio and position.

    The fraction of the area is uniform in `area`, the logarithm of width over height is
    uniform in `aspect`, and the position is uniform. A box that does not fit is drawn
    again. After `ATTEMPTS` draws, the result is the largest central part with an aspect
    ratio in range.

    References:
        Szegedy et al. (2015, GoogLeNet), section 6.
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
    r"""Return four color distortions as one affine map, shape (3, 4).

    $$
    x \mapsto x + b, \quad x \mapsto \bar x + c (x - \bar x), \quad
    x \mapsto g(x) + s (x - g(x)), \quad x \mapsto R_h x
    $$

    $\bar x$ is the image's mean color at that point, $b$ is in the image's units, $g$
    is the gray of the image ($s = 0$ makes it gray), and $R_h$ is a rotation by $h$
    turns about the gray axis. Values are not clipped between the distortions. `order`
    counts brightness as 0, contrast as 1, saturation as 2, hue as 3. The last column is
    the offset.
    """
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    linear = {
        2: saturation * np.eye(3) + (1 - saturation) * _GREY,
        3: _YIQ_INVERSE @ turn @ _YIQ,
    }
    matrix, offset = np.eye(3), np.zeros(3)
    for which in order:
        if which == 0:
            offset = offset + brightness
        elif which == 1:
            around_mean = (1 - contrast) * (matrix @ mean + offset)
            matrix, offset = contrast * matrix, contrast * offset + around_mean
        else:
            matrix, offset = linear[which] @ matrix, linear[which] @ offset
    return np.column_stack([matrix, offset])


def distort_colors(
    image: np.ndarray, rng: np.random.Generator, strength: float = 1.0
) -> np.ndarray:
    """Change the brightness, contrast, saturation and hue of an image at random.

    The paper distorts less than GoogLeNet, whose ranges (after Howard, 2013) are
    unpublished. The ranges here are a common substitute: at strength 1, brightness
    within 32 of 255, contrast and saturation from 0.5 to 1.5, hue within 0.2 of a turn.
    All ranges are proportional to `strength`. The order is random.
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


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, augment: AugmentConfig
) -> np.ndarray:
    """Resize a random part by a random interpolation, mirror it, change its colors."""
    import cv2

    height, width = image.shape[:2]
    box = random_area_box(rng, height, width, augment.area, augment.aspect)
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    kinds = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
    kind = kinds[rng.integers(len(kinds))]
    result = cv2.resize(part, (size, size), interpolation=kind)
    if augment.flip and rng.integers(2):
        result = cv2.flip(result, 1)
    if image.shape[2:] == (3,):
        result = distort_colors(result, rng, augment.strength)
    return result.reshape(size, size, *image.shape[2:])


def shift_and_mirror(
    images: jax.Array, keys: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
    """Pad each image with zeros, cut the original size at random, mirror half of them.

    Images have the shape (batch, height, width[, channels]). Each image has its own key
    and moves by at most `padding` pixels.

    References:
        He et al. (2016, ResNet), section 4.2, for CIFAR-10.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        place, mirror = jax.random.split(key)
        around = [(padding, padding)] * 2 + [(0, 0)] * (image.ndim - 2)
        start = jax.random.randint(place, (2,), 0, 2 * padding + 1)
        start = jnp.pad(start, (0, image.ndim - 2))
        cut = jax.lax.dynamic_slice(jnp.pad(image, around), start, image.shape)
        return jnp.where(flip & jax.random.bernoulli(mirror), cut[:, ::-1], cut)

    return jax.vmap(one)(images, keys)
