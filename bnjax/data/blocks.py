"""Blocks of the test set of bounded size, and the crops of their images."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from bnjax.data.config import DataConfig, SettingError
from bnjax.data.images import resized
from bnjax.data.pipeline import read_ahead
from bnjax.data.records import Arrays, Damage, check_label, check_shape
from bnjax.data.sources import Report, Source

BLOCK_BYTES = 2**26
CROPS = (1, 10, 144)
# The lengths to which the shorter side of an image is scaled, for 224-pixel networks.
_SIDES = {10: (256,), 144: (256, 288, 320, 352)}
S = TypeVar("S")


def padded_rows(examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices that cover every example once, and a mask, False on padding.

    Returns:
        The indices and the mask, of shape (batches, batch_size).
    """
    batches = -(-examples // batch_size)
    places = np.arange(batches * batch_size, dtype=np.int32).reshape(batches, -1)
    mask = places < examples
    return np.where(mask, places, 0), mask


class Block(NamedTuple):
    """Some examples, and a mask that is False for damaged examples and padding."""

    arrays: Arrays
    kept: np.ndarray


class CropBlock(NamedTuple):
    """The crops of some examples."""

    images: np.ndarray
    """Crops, uint8, shape (images, ...); the crops of one example are consecutive."""
    places: np.ndarray
    """For each image, the index of its example in the block."""
    counts: np.ndarray
    """For each image, the number of equal crops that it represents."""
    labels: np.ndarray
    """The labels of the block's examples."""
    kept: np.ndarray
    """Whether each of the block's examples counts."""


@dataclasses.dataclass(frozen=True)
class SplitBlocks:
    """The test set in blocks of `size`, decoded in each pass; the last is padded."""

    source: Source
    size: int

    def __len__(self) -> int:
        return math.ceil(self.source.sizes["test"] / self.size)

    def __iter__(self) -> Iterator[Block]:
        def make(images: list, labels: np.ndarray, kept: np.ndarray) -> Block:
            filled = np.zeros((self.size, *self.source.image_shape), np.uint8)
            for place, image, where in images:
                filled[place] = self.source.fit(image, where)
            return Block(Arrays(filled, labels), kept)

        return self.read(make)

    def read(self, make: Callable[[list, np.ndarray, np.ndarray], S]) -> Iterator[S]:
        """Yield `make(...)` of each block, reading ahead; report damaged images.

        The arguments of `make` are: for each intact example, its place in the block,
        the stored image and its name; all labels; and a mask of the intact examples.
        """
        import grain

        records = self.source.splits["test"]
        damage = Damage(records)

        def read_block(rows: np.ndarray) -> tuple[S, dict[int, str]]:
            images, problems = [], {}
            labels, kept = np.zeros(self.size, np.int32), np.zeros(self.size, bool)
            for place, example in enumerate(records.read(rows.tolist())):
                row = int(rows[place])
                where = records.where(row)
                if example.image is None:
                    problems[row] = example.problem
                    continue
                check_label(example.label, self.source.classes, where)
                images.append((place, example.image, where))
                labels[place], kept[place] = example.label, True
            return make(images, labels, kept), problems

        rows = grain.MapDataset.range(len(records)).batch(self.size)
        for block, problems in read_ahead(rows.map(read_block)):
            damage.add(problems)
            yield block


def load_test(data: DataConfig, source: Source, report: Report) -> Arrays | SplitBlocks:
    """Return the test set, in memory up to `data.resident_bytes`, else in blocks."""
    size = math.prod(source.image_shape)
    if source.sizes["test"] * size <= data.resident_bytes:
        return source.load("test", report)
    return SplitBlocks(source, max(1, min(BLOCK_BYTES, data.resident_bytes) // size))


def scaled_sizes(
    height: int, width: int, size: int, crops: int
) -> list[tuple[int, int]]:
    """Return the heights and widths to which an image is scaled before cropping.

    For a network of 224 pixels, the shorter side becomes 256 for 10 crops, and 256,
    288, 320 and 352 for 144 crops. For another `size` the lengths are in proportion,
    and rounded.
    """
    sides, shorter = (round(s * size / 224) for s in _SIDES[crops]), min(height, width)
    return [(round(height * s / shorter), round(width * s / shorter)) for s in sides]


def boxes(height: int, width: int, size: int, crops: int) -> np.ndarray:
    """Return the 10 or 144 crops of one image, as boxes in the scaled image.

    10 crops: the four corners and the center of the central square, each of them also
    mirrored. 144 crops: at each of four scales, the left, central and right square (in
    an upright image, the top, central and bottom square); of each square, the four
    corners, the center, and the whole square resized; each of them also mirrored. In a
    square image the three squares are identical, so each crop appears three times.

    Returns:
        int32, shape (crops, 6): the index of the scale in `scaled_sizes`, top, left,
        height and width in pixels of that scale, and 1 for a mirrored crop.

    References:
        Szegedy et al. (2015, GoogLeNet), section 7, for 144 crops; Krizhevsky et al.
        (2012), section 4.1, for 10 crops.
    """
    found = []
    for scale, (tall, wide) in enumerate(scaled_sizes(height, width, size, crops)):
        side = min(tall, wide)
        free_y, free_x, free = tall - side, wide - side, side - size
        squares = [(free_y // 2, free_x // 2)]
        parts = [(y, x, size) for y in (0, free) for x in (0, free)]
        parts.append((free // 2, free // 2, size))
        if crops == 144:
            squares = [(0, 0), *squares, (free_y, free_x)]
            parts.append((0, 0, side))
        found += [
            (scale, top + y, left + x, length, length, mirrored)
            for top, left in squares
            for y, x, length in parts
            for mirrored in (0, 1)
        ]
    return np.array(found, np.int32)


def cut(image: np.ndarray, size: int, crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct crops of an image, and how often each occurs."""
    height, width = image.shape[:2]
    scaled = [resized(image, *s) for s in scaled_sizes(height, width, size, crops)]
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


@dataclasses.dataclass(frozen=True)
class CropBlocks:
    """The crops of the test set in blocks: 1 (as in the run's evaluation), 10 or 144.

    Each pass makes the crops again; the crops of one block are in memory together.
    """

    split: SplitBlocks
    crops: int

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[CropBlock]:
        return self.split.read(self._make)

    def _make(self, images: list, labels: np.ndarray, kept: np.ndarray) -> CropBlock:
        source, none = self.split.source, np.zeros(0, np.int64)
        # Start with an empty part, because all images of a block may be damaged.
        parts = [(np.zeros((0, *source.image_shape), np.uint8), none, none)]
        for place, image, where in images:
            if self.crops == 1:
                found, counts = source.fit(image, where)[None], np.ones(1, np.int64)
            else:
                if source.resize is None:
                    check_shape(image, source.image_shape, where)
                found, counts = cut(image, source.image_shape[0], self.crops)
                # Cubic interpolation may exceed the range of its input.
                found = np.minimum(found, np.uint8(source.max_value))
            parts.append((found, np.full(len(counts), place), counts))
        crops, places, counts = map(np.concatenate, zip(*parts, strict=True))
        return CropBlock(crops, places, counts, labels, kept)


def crop_blocks(source: Source, crops: int) -> CropBlocks:
    """Return the crops of a test set, in blocks of a bounded size."""
    if crops not in CROPS:
        raise SettingError(f"--crops {crops}: expected 1, 10 or 144.")
    height, width = source.image_shape[:2]
    if crops > 1 and height != width:
        raise SettingError(
            f"--crops {crops}: the crops are squares, but the network takes images of "
            f"{height}x{width}. Give --crops 1."
        )
    size = crops * math.prod(source.image_shape)
    return CropBlocks(SplitBlocks(source, max(1, BLOCK_BYTES // size)), crops)
