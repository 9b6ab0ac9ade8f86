"""A folder of images: train/<class>/<file>, and test or val beside it."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bnjax.data.records import Example, decode_image
from bnjax.training.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
CHANNELS = 3
LAYOUT = (
    "Expected train/<class>/*.jpg, and test/<class>/*.jpg or val/<class>/*.jpg with "
    "the same classes."
)


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """The images of one split.

    Args:
        folder: of the split.
        files: relative to it, one an example.
        labels: one an example.
    """

    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.files)

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Read and decode some files, as RGB.

        Raises:
            UserError: a file is gone, or may not be read.
        """
        return [Example(self._image(row), self.labels[row]) for row in rows]

    def where(self, row: int) -> str:
        """Name the file."""
        return str(self.folder / self.files[row])

    def fingerprint(self) -> str:
        """Digest what the files are: their names, labels, sizes and times."""
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels, strict=True):
            status = (self.folder / file).stat()
            line = f"{file} {label} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode())
        return digest.hexdigest()[:16]

    def _image(self, row: int) -> np.ndarray | None:
        try:
            encoded = (self.folder / self.files[row]).read_bytes()
        except OSError as error:
            raise _unreadable(self.folder / self.files[row], error) from error
        return decode_image(encoded, CHANNELS)


def open_folder(root: Path) -> tuple[dict[str, FolderRecords], list[str]]:
    """List the images of every split, opening none.

    Args:
        root: holds a folder for each split, with one for each class.

    Returns:
        The splits by name, "val" among them as "validation", and the classes' names
        in the order of their labels: sorted.

    Raises:
        UserError: a folder is missing, empty or unreadable, or the splits have
            different classes.
    """
    names = [path.name for path in _list(root) if path.is_dir()]
    splits = [name for name in ("train", "test", "val", "validation") if name in names]
    if "train" not in splits or len(splits) < 2:
        raise UserError(
            f"{root} holds the folders {', '.join(sorted(names)) or '(none)'}. {LAYOUT}"
        )
    classes = _classes(root / "train")
    records = {}
    for split in splits:
        found = _classes(root / split)
        if found != classes:
            differing = sorted(set(found) ^ set(classes))
            raise UserError(
                f"{root / split} and {root / 'train'} have different classes: "
                f"{', '.join(differing[:5])} is in one alone. {LAYOUT}"
            )
        name = "validation" if split == "val" else split
        records[name] = _open_split(root / split, classes)
    return records, classes


def _open_split(folder: Path, classes: list[str]) -> FolderRecords:
    files, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(
            path.name
            for path in _list(folder / name)
            if path.suffix.lower() in SUFFIXES
        )
        if not images:
            raise UserError(
                f"class folder {folder / name} holds no image "
                f"({', '.join(SUFFIXES)}). Fill it, or remove the class everywhere."
            )
        files += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return FolderRecords(folder, tuple(files), tuple(labels))


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in _list(folder) if path.is_dir())
    if not names:
        raise UserError(f"{folder} holds no class folder. {LAYOUT}")
    return names


def _list(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read: {error.strerror or error}. Check that it is there "
        "and that its permissions let you read it."
    )
