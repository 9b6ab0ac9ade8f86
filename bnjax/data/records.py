"""Examples of one split, in memory, in tfds files or in a folder of images."""

import dataclasses
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from bnjax._validate import first_line
from bnjax.data.config import DataError
from bnjax.data.images import ImageError, printable, read_file

Decode = functools.partial[np.ndarray]
# More damaged images than this fraction of a set are an error.
DAMAGED_SHARE = 1e-3


class Arrays(NamedTuple):
    """Examples of one split: uint8 images as the source stores them, int32 labels."""

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


class Example(NamedTuple):
    """One example; a damaged image is None, and `problem` says why."""

    image: np.ndarray | None
    label: int
    problem: str = "cannot be decoded"


class Records(Protocol):
    """The examples of one split, by row."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Read and decode some rows."""
        ...

    def where(self, row: int) -> str:
        """Return the file or the record of a row, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Rows of arrays in memory."""

    name: str
    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays.labels)

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Return some rows."""
        images, labels = (np.asarray(array) for array in self.arrays)
        return [Example(images[row], int(labels[row])) for row in rows]

    def where(self, row: int) -> str:
        """Return the row's name."""
        return f"example {row} of {self.name}"


@dataclasses.dataclass(frozen=True)
class PreparedRecords:
    """The examples of one split, read by tfds."""

    name: str
    folder: Path
    split: str
    size: int
    decode: Decode

    def __len__(self) -> int:
        return self.size

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Read and decode some examples."""
        try:
            return [
                _example(self.decode, found["image"], found["label"])
                for found in self._source.__getitems__(list(rows))
            ]
        except Exception as error:
            raise DataError(
                f"data set {self.name!r} in {self.folder} could not be read: "
                f"{first_line(error)}. Its files are damaged or missing: delete "
                f"the folder and prepare it again. {how_to_prepare(self.name)}"
            ) from error

    def where(self, row: int) -> str:
        """Return the record's name."""
        return f"record {row} of {self.split} of {self.name} in {self.folder}"

    def cache_key(self) -> str:
        """Return a name that depends on the files and on how they are decoded."""
        lines = []
        for path in sorted(self.folder.iterdir()):
            lines.append(_file_line(path))
            if path.suffix == ".json":
                lines.append(path.read_bytes())
        name = self.name.replace("/", "-")
        return f"{name}-{self.split}-{_digest(self.decode, lines)}"

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        decoders = {"image": tfds.decode.SkipDecoding()}
        source: Any = builder.as_data_source
        return source(split=self.split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files."""
        return {n: value for n, value in vars(self).items() if n != "_source"}


def how_to_prepare(name: str, root: Path | None = None) -> str:
    """Return the commands that prepare a tfds set."""
    base = re.sub(r":.*|/\d+\.\d+\.\d+$", "", name)
    where = f", data_dir={str(root)!r}" if root else ""
    return (
        "To prepare it, once, with a network:\n"
        "  pip install '.[prepare]'  (in a clone of bnjax)\n"
        '  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({base!r}, file_format='array_record'{where})"
        '.download_and_prepare()"'
    )


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """The images of one split: files, relative to a folder, and their labels."""

    name: str
    split: str
    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    decode: Decode

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Read and decode some files."""

        def decode(file: str) -> np.ndarray:
            return self.decode(read_file(self.folder / file))

        return [_example(decode, self.files[row], self.labels[row]) for row in rows]

    def where(self, row: int) -> str:
        """Return the file's name."""
        return printable(self.folder / self.files[row])

    def names_digest(self) -> str:
        """Return a digest of the names of the files and their labels."""
        named = zip(self.files, self.labels, strict=True)
        content = b"".join(os.fsencode(f"{file} {label}\n") for file, label in named)
        return hashlib.sha256(content).hexdigest()[:16]

    def cache_key(self) -> str:
        """Return a name that depends on the files and on how they are decoded."""
        lines = []
        for file, label in zip(self.files, self.labels, strict=True):
            lines += [os.fsencode(f"{file} {label} "), _file_line(self.folder / file)]
        return f"{self.name}-{self.split}-{_digest(self.decode, lines)}"


def _digest(decode: Decode, lines: Sequence[bytes]) -> str:
    content = b"".join([repr(decode.keywords).encode(), *lines])
    return hashlib.sha256(content).hexdigest()[:16]


def _file_line(path: Path) -> bytes:
    try:
        status = path.stat()
    except OSError as error:
        return os.fsencode(f"{path.name} {error.errno}\n")
    return os.fsencode(f"{path.name} {status.st_size} {status.st_mtime_ns}\n")


def _example(decode: Callable[[Any], np.ndarray], stored: Any, label: Any) -> Example:
    try:
        return Example(decode(stored), int(label))
    except ImageError as error:
        return Example(None, int(label), str(error))


# --- Damage and errors in a split ---------------------------------------------------


class Damage:
    """Counts the damaged images of a split and reports each of them once."""

    def __init__(self, records: Records) -> None:
        self.rows: dict[int, str] = {}
        self._records = records

    def add(self, problems: Mapping[int, str]) -> None:
        """Report rows on standard error; refuse more than `DAMAGED_SHARE` of them."""
        new = {row: problems[row] for row in sorted(problems) if row not in self.rows}
        self.rows |= new
        total, where = len(self._records), self._records.where
        if len(self.rows) > DAMAGED_SHARE * total:
            first = sorted(self.rows)[:3]
            named = "; ".join(
                f"{where(row)}: {self.rows[row]}".removesuffix(": cannot be decoded")
                for row in first
            )
            more = len(self.rows) - len(first)
            raise DataError(
                f"{len(self.rows)} of {total:,} images cannot be decoded, more than "
                f"{DAMAGED_SHARE:.1%}: {named}{f'; and {more} more' if more else ''}. "
                "Fetch them again, or remove them."
            )
        for row, problem in new.items():
            note(f"{where(row)} {problem} and is left out")


def check_label(label: int, classes: int, where: str) -> None:
    """Refuse a label outside the range of the classes."""
    if not 0 <= label < classes:
        raise DataError(
            f"{where} has the label {label}; expected 0 to {classes - 1}. Training and "
            "testing need labels: give another split with --data.test-split, or "
            "prepare the set again."
        )


def check_shape(image: np.ndarray, expected: tuple[int, ...], where: str) -> None:
    """Refuse an image of another size."""
    if image.shape != expected:
        raise DataError(
            f"{where} has the shape {image.shape}; expected {expected}. If images have "
            "many sizes, give --data.image-size."
        )


def check_classes(
    labels: jax.Array | np.ndarray, class_names: Sequence[str], split: str, where: str
) -> None:
    """Refuse a training set of one class; report classes without an example."""
    counts = np.bincount(np.asarray(labels), minlength=len(class_names))
    if split == "train" and np.count_nonzero(counts) < 2:
        raise DataError(
            f"all {len(labels):,} training examples of {where} are of one class, so "
            "that there is nothing to learn. Give examples of at least two classes."
        )
    missing = [class_names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        note(
            f"the {split} split of {where} has no example of {len(missing)} of "
            f"{len(class_names)} classes: {shown}"
        )


def note(message: str) -> None:
    """Print a note on standard error."""
    print(f"note: {message}", file=sys.stderr)
