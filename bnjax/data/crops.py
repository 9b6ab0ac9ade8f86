"""Several crops of each test image, whose class probabilities are averaged."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bnjax.data.augment import resized
from bnjax.data.blocks import BLOCK_BYTES, SplitBlocks
from bnjax.data.records import check_shape, note_damaged
from bnjax.data.sources import Source
from bnjax.training.errors import USAGE, UserError

CROPS = (1, 10, 144)
# The shorter side that an image is scaled to, for a network of 224 pixels.
_SIDES = {10: (256,), 144: (256, 288, 320, 352)}
_FOR_SIZE = 224


def scaled_sizes(
    height: int, width: int, size: int, crops: int
) -> list[tuple[int, int]]:
    """Return the heights and widths that an image is scaled to.

    The shorter side becomes 256 for 10 crops, and 256, 288, 320 and 352 for 144, where
    the network is given 224 pixels; for another size, in proportion and rounded.

    Args:
        height: of the stored image.
        width: of the stored image.
        size: height and width that the network is given.
        crops: 10 or 144.

    Example:
        >>> scaled_sizes(500, 400, 224, 144)
        [(320, 256), (360, 288), (400, 320), (440, 352)]
        >>> scaled_sizes(32, 32, 32, 144)
        [(37, 37), (41, 41), (46, 46), (50, 50)]
    """
    sides = [round(side * size / _FOR_SIZE) for side in _SIDES[crops]]
    shorter = min(height, width)
    return [
        (round(height * side / shorter), round(width * side / shorter))
        for side in sides
    ]


def boxes(height: int, width: int, size: int, crops: int) -> np.ndarray:
    """Return the crops of one image, as places in the image scaled.

    10 crops: of the central square, the four corners and the centre, and each of them
    mirrored. 144 crops: at each of four scales, the left, the central and the right
    square (of an upright image the top, the central and the bottom one); of each
    square, the four corners, the centre and all of it, made smaller; and each of them
    mirrored. The three squares of a square image are one and the same: its crops are
    there three times.

    Args:
        height: of the stored image.
        width: of the stored image.
        size: height and width that the network is given.
        crops: 10 or 144.

    Returns:
        int32, shape (crops, 6): the scale's number in `scaled_sizes`, top, left,
        height and width in pixels of that scale, and 1 for a crop to be mirrored.

    Example:
        >>> boxes(300, 200, 224, 10)[:3].tolist()
        [[0, 64, 0, 224, 224, 0], [0, 64, 0, 224, 224, 1], [0, 64, 32, 224, 224, 0]]

    References:
        Szegedy et al. 2015 (GoogLeNet), section 7, for the 144; Krizhevsky et al. 2012,
        section 4.1, for the 10.
    """
    found = []
    for scale, (tall, wide) in enumerate(scaled_sizes(height, width, size, crops)):
        side = min(tall, wide)
        free_y, free_x = tall - side, wide - side
        squares = [(free_y // 2, free_x // 2)]
        if crops == 144:
            squares = [(0, 0), *squares, (free_y, free_x)]
        free = side - size
        parts = [(y, x, size) for y in (0, free) for x in (0, free)]
        parts.append((free // 2, free // 2, size))
        if crops == 144:
            parts.append((0, 0, side))
        found += [
            (scale, top + y, left + x, length, length, mirrored)
            for top, left in squares
            for y, x, length in parts
            for mirrored in (0, 1)
        ]
    return np.array(found, np.int32)


def cut(image: np.ndarray, size: int, crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the crops of one image out, equal ones once.

    Args:
        image: uint8, shape (height, width) or (height, width, channels).
        size: height and width of each crop.
        crops: 10 or 144.

    Returns:
        The different crops, uint8 of shape (different, size, size, ...), and how many
        times each of them counts, int64 of shape (different,); those add up to `crops`.

    Example:
        >>> images, counts = cut(np.zeros((40, 40, 3), np.uint8), 32, 144)
        >>> images.shape, counts.tolist() == [3] * 48
        ((48, 32, 32, 3), True)
    """
    height, width = image.shape[:2]
    scaled = [
        resized(image, *shape) for shape in scaled_sizes(height, width, size, crops)
    ]
    different, counts = np.unique(
        boxes(height, width, size, crops), axis=0, return_counts=True
    )
    images = np.empty((len(different), size, size, *image.shape[2:]), np.uint8)
    for place, (scale, y, x, tall, wide, mirrored) in enumerate(different.tolist()):
        part = scaled[scale][y : y + tall, x : x + wide]
        if tall != size:
            part = resized(part, size, size)
        images[place] = part[:, ::-1] if mirrored else part
    return images, counts


class CropBlock(NamedTuple):
    """The crops of some examples.

    Args:
        images: uint8, shape (images, ...): those of one example follow each other.
        places: which example of the block each is of, shape (images,).
        counts: how many crops each stands for, shape (images,).
        labels: of the examples, shape (examples,).
        kept: which examples there are: not damaged, not there to fill up.
    """

    images: np.ndarray
    places: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class CropBlocks:
    """The crops of the test set in blocks, made anew each time they are gone through.

    Args:
        split: the test set; the crops of one of its blocks are in memory together.
        crops: of each image: 1, as the run itself evaluates, 10 or 144.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> source = open_source("synthetic:16x16x3:5:30")
        >>> blocks = CropBlocks(SplitBlocks(source, size=20), crops=10)
        >>> [block.images.shape for block in blocks]
        [(200, 16, 16, 3), (100, 16, 16, 3)]
    """

    split: SplitBlocks
    crops: int

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return len(self.split)

    def __getitem__(self, index: int) -> CropBlock:
        """Read one block.

        Raises:
            UserError: an example has another shape or a wrong label.
        """
        source = self.split.source
        images, places, counts = [], [], []
        labels = np.zeros(self.split.size, np.int32)
        kept = np.zeros(self.split.size, bool)
        for row, (image, label) in self.split.examples(index):
            place = row - index * self.split.size
            labels[place], kept[place] = label, True
            found, times = self._cut(image, source.splits["test"].where(row))
            images.append(found)
            counts.append(times)
            places.append(np.full(len(times), place))
        # First nothing: all of a block may be damaged.
        none = np.zeros(0, np.int64)
        return CropBlock(
            np.concatenate([np.zeros((0, *source.image_shape), np.uint8), *images]),
            np.concatenate([none, *places]),
            np.concatenate([none, *counts]),
            labels,
            kept,
        )

    def __iter__(self) -> Iterator[CropBlock]:
        """Go through all blocks, reading ahead; name damaged images at the end.

        Raises:
            UserError: too many images are damaged, or one cannot be used.
        """
        damaged = []
        for index, block in enumerate(self.split.read(self)):
            rows = self.split.rows(index)
            damaged += [row for row in rows if not block.kept[row - rows.start]]
            yield block
        note_damaged(damaged, self.split.source.splits["test"])

    def _cut(self, image: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
        source = self.split.source
        if source.resize is None:
            check_shape(image, source.image_shape, where)
        if self.crops == 1:
            one = source.resize(image) if source.resize else image
            return one[None], np.ones(1, np.int64)
        images, counts = cut(image, source.image_shape[0], self.crops)
        # A cubic goes beyond the values it is given.
        return np.minimum(images, np.uint8(source.max_value)), counts


def crop_blocks(source: Source, crops: int) -> CropBlocks:
    """Return the crops of a test set, in blocks of a bounded size.

    Raises:
        UserError: `crops` is none of `CROPS`, or the network is not given squares.
    """
    if crops not in CROPS:
        raise UserError(f"--crops {crops}: expected 1, 10 or 144.", USAGE)
    height, width = source.image_shape[:2]
    if crops > 1 and height != width:
        raise UserError(
            f"--crops {crops}: the crops are squares, and the network takes images of "
            f"{height}x{width}. Give --crops 1.",
            USAGE,
        )
    size = crops * math.prod(source.image_shape)
    return CropBlocks(SplitBlocks(source, max(1, BLOCK_BYTES // size)), crops)
