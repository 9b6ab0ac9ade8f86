"""A test set too large to hold: read block by block, every example once."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bnjax.data.config import DataConfig
from bnjax.data.records import check_damaged, check_label, check_shape
from bnjax.data.resident import Arrays, Report
from bnjax.data.sources import Source
from bnjax.data.streaming import read_ahead

BLOCK_BYTES = 2**26


class Block(NamedTuple):
    """Some examples, and which of them count: not damaged, not there to fill up."""

    arrays: Arrays
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class SplitBlocks:
    """The test set in blocks of one size, decoded anew each time they are gone through.

    Args:
        source: the data set.
        size: examples in a block; the last is filled up.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> blocks = SplitBlocks(open_source("digits"), size=100)
        >>> [int(block.kept.sum()) for block in blocks]
        [100, 100, 100, 55]
    """

    source: Source
    size: int

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return math.ceil(self.source.sizes["test"] / self.size)

    def __getitem__(self, index: int) -> Block:
        """Read one block.

        Raises:
            UserError: an example has another shape or a wrong label.
        """
        source, records = self.source, self.source.splits["test"]
        images = np.zeros((self.size, *source.image_shape), np.uint8)
        labels = np.zeros(self.size, np.int32)
        kept = np.zeros(self.size, bool)
        for row, (stored, label) in self.examples(index):
            image = source.resize(stored) if source.resize else stored
            check_shape(image, source.image_shape, records.where(row))
            place = row - index * self.size
            images[place], labels[place], kept[place] = image, label, True
        return Block(Arrays(images, labels), kept)

    def __iter__(self) -> Iterator[Block]:
        """Go through all blocks, reading ahead.

        Raises:
            UserError: too many images are damaged, or one cannot be used.
        """
        return self.read(self)

    def examples(self, index: int) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
        """Read the examples of one block as they are stored, but for damaged ones.

        Returns:
            The row of each, and its image and label.

        Raises:
            UserError: an example has a wrong label.
        """
        records, rows = self.source.splits["test"], self.rows(index)
        for row, (image, label) in zip(rows, records.read(rows), strict=True):
            if image is not None:
                check_label(label, self.source.classes, records.where(row))
                yield row, (image, label)

    def read(self, made: Any) -> Iterator[Any]:
        """Go through what is made of each block, reading ahead.

        Args:
            made: as many items as there are blocks, each with a mask `kept`.

        Raises:
            UserError: too many images are damaged, or one cannot be used.
        """
        records = self.source.splits["test"]
        damaged: list[int] = []
        items = read_ahead(made, 0, workers=0, prefetch=2)
        for index in range(len(self)):
            item = next(items)
            rows = self.rows(index)
            damaged += [row for row in rows if not item.kept[row - rows.start]]
            check_damaged(damaged, records)
            yield item

    def rows(self, index: int) -> range:
        """Return which examples a block holds."""
        stop = min((index + 1) * self.size, self.source.sizes["test"])
        return range(index * self.size, stop)


def load_test(data: DataConfig, source: Source, report: Report) -> Arrays | SplitBlocks:
    """Return the test set: in memory up to `data.resident_bytes`, else in blocks."""
    size = math.prod(source.image_shape)
    if source.sizes["test"] * size <= data.resident_bytes:
        return source.load("test", report)
    return SplitBlocks(source, max(1, min(BLOCK_BYTES, data.resident_bytes) // size))
