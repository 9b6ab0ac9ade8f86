"""Examples read one by one, where the streaming path needs them.

Worker processes read them too: records are pickled, and open no file before they are
read from.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bnjax.data.augment import CentralCrop
from bnjax.data.resident import Arrays, Report
from bnjax.training.errors import UserError

CHUNK = 500
# More damaged images than this share of a set are an error.
DAMAGED_SHARE = 1e-3
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}


class Example(NamedTuple):
    """One example; its image is None where the file is damaged."""

    image: np.ndarray | None
    label: int


class Records(Protocol):
    """The examples of one split, by row."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Read and decode some rows."""
        ...

    def where(self, row: int) -> str:
        """Say which file, or which record, a row is."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Rows of arrays in memory."""

    name: str
    arrays: Arrays

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.arrays.labels)

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Return some rows."""
        images, labels = (np.asarray(array) for array in self.arrays)
        return [Example(images[row], int(labels[row])) for row in rows]

    def where(self, row: int) -> str:
        """Name the row."""
        return f"example {row} of {self.name}"


def decode_image(encoded: bytes, channels: int) -> np.ndarray | None:
    """Decode a JPEG, a PNG or what else OpenCV reads.

    Args:
        encoded: the file's content.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 of shape (height, width, channels), or None where the file is truncated
        or otherwise no image. OpenCV itself fills a truncated JPEG up with grey.
    """
    import cv2

    end = _ENDS.get(encoded[:2])
    if not encoded or (end and end not in encoded[-64:]):
        return None
    kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(
            np.frombuffer(encoded, np.uint8), kind | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:
        return None
    return None if image is None else image.reshape(*image.shape[:2], channels)


def check_label(label: int, classes: int, where: str) -> None:
    """Refuse a label that no logit stands for.

    Raises:
        UserError: naming the example.
    """
    if not 0 <= label < classes:
        raise UserError(
            f"{where} has the label {label}; expected 0 to {classes - 1}. A split "
            "without labels cannot be trained or tested on: name another with "
            "--data.test-split, or prepare the set again."
        )


def check_damaged(damaged: Sequence[int], records: Records) -> None:
    """Refuse a set of which more than `DAMAGED_SHARE` is damaged.

    Raises:
        UserError: naming the first few.
    """
    if len(damaged) > DAMAGED_SHARE * len(records):
        named = "; ".join(records.where(row) for row in sorted(damaged)[:3])
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise UserError(
            f"{len(damaged)} of {len(records):,} images cannot be decoded, more than "
            f"{DAMAGED_SHARE:.1%}: {named}{more}. Fetch them again, or remove them."
        )


def note_damaged(damaged: Iterable[int], records: Records) -> None:
    """Name damaged images on standard error."""
    for row in sorted(damaged):
        print(
            f"note: {records.where(row)} cannot be decoded and is left out",
            file=sys.stderr,
        )


def load_records(
    records: Records,
    classes: int,
    image_shape: tuple[int, ...],
    resize: CentralCrop | None,
    report: Report,
) -> Arrays:
    """Read a whole split into memory, leaving damaged images out.

    Args:
        records: the split.
        classes: how many labels there are.
        image_shape: of one image in the result.
        resize: what makes it that shape; None where it has it.
        report: called with examples read and their total.

    Raises:
        UserError: too many images are damaged, or one has another shape or a wrong
            label.
    """
    total = len(records)
    images = np.empty((total, *image_shape), np.uint8)
    labels = np.empty(total, np.int32)
    damaged: list[int] = []
    kept = 0
    for start in range(0, total, CHUNK):
        rows = range(start, min(start + CHUNK, total))
        for row, example in zip(rows, records.read(rows), strict=True):
            if example.image is None:
                damaged.append(row)
                check_damaged(damaged, records)
                continue
            check_label(example.label, classes, records.where(row))
            image = resize(example.image) if resize else example.image
            check_shape(image, image_shape, records.where(row))
            images[kept], labels[kept] = image, example.label
            kept += 1
        report(rows.stop, total)
    note_damaged(damaged, records)
    return Arrays(images[:kept], labels[:kept])


def check_shape(image: np.ndarray, expected: tuple[int, ...], where: str) -> None:
    """Refuse an image of another size.

    Raises:
        UserError: naming the image.
    """
    if image.shape != expected:
        raise UserError(
            f"{where} has the shape {image.shape}; expected {expected}. For images of "
            "many sizes give --data.image-size."
        )
