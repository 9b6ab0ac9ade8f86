"""Prepared TensorFlow Datasets, read without TensorFlow and without a network."""

import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.data.cache import cached
from bnjax.data.resident import Arrays
from bnjax.training.errors import UserError, did_you_mean, first_line

CHUNK = 500
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set, not yet read."""

    name: str
    folder: Path
    sizes: dict[str, int]
    classes: int
    image_shape: tuple[int, ...]
    builder: Any

    def load(self, split: str, report: Callable[[int, int], None]) -> Arrays:
        """Read one split, from the cache where it was decoded before."""
        key = f"{self.name.replace('/', '-')}-{split}-{_fingerprint(self.folder)}"
        return cached(key, functools.partial(self._decode, split, report))

    def _decode(self, split: str, report: Callable[[int, int], None]) -> Arrays:
        examples = self.sizes[split]
        images = np.empty((examples, *self.image_shape), np.uint8)
        labels = np.empty(examples, np.int32)
        # absl would advise OpenCV, which matters for large images only.
        logging.getLogger("absl").addFilter(_no_opencv_advice)
        try:
            source = self.builder.as_data_source(split=split)
            for start in range(0, examples, CHUNK):
                stop = min(start + CHUNK, examples)
                for place, example in enumerate(
                    source.__getitems__(range(start, stop)), start
                ):
                    images[place] = example["image"]
                    labels[place] = example["label"]
                report(stop, examples)
        except Exception as error:
            raise UserError(
                f"data set {self.name!r} in {self.folder} could not be read: "
                f"{first_line(error)}. Its files are damaged or missing: delete "
                f"the folder and prepare it again. {_how_to_prepare(self.name)}"
            ) from error
        return Arrays(images, labels)


def find_data_dir(data_dir: Path | None = None) -> Path:
    """Return the folder given, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(given).expanduser()


def open_prepared(name: str, data_dir: Path | None = None) -> Prepared:
    """Find a prepared data set by looking at the folders alone.

    tfds itself would try to download what it does not find, for minutes.

    Args:
        name: as tfds has it: "mnist", "mnist:3.0.1", "name/config".
        data_dir: see `find_data_dir`.

    Raises:
        UserError: it is not there, or is no set of images of one size with labels.
    """
    root = find_data_dir(data_dir)
    folder = _find_folder(name, root)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        info = builder.info
    except Exception as error:
        raise UserError(
            f"data set {name!r} in {folder} could not be opened: "
            f"{first_line(error)}. Its description is damaged: delete the folder and "
            f"prepare it again. {_how_to_prepare(name)}"
        ) from error
    return _check(name, folder, builder, info)


def _check(name: str, folder: Path, builder: Any, info: Any) -> Prepared:
    """Refuse a data set that does not hold images of one size, with labels."""
    where = f"data set {name!r} in {folder}"
    if info.file_format is None or info.file_format.value != "array_record":
        raise UserError(
            f"{where} is not stored as array_record, which reading it without "
            f"TensorFlow needs. {_how_to_prepare(name)}"
        )
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    if not {"train", "test"} <= set(sizes):
        raise UserError(
            f"{where} has the splits {', '.join(sizes)}; expected train and test."
        )
    features = dict(info.features)
    shape: Any = getattr(features.get("image"), "shape", (None,))
    classes = getattr(features.get("label"), "num_classes", None)
    if None in shape or classes is None:
        raise UserError(
            f"{where} has the features {info.features}; expected an image of a fixed "
            "size and a class label."
        )
    return Prepared(info.full_name, folder, sizes, classes, tuple(shape), builder)


def _find_folder(name: str, root: Path) -> Path:
    base, _, version = name.partition(":")
    parent = root / base
    versions = [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if _VERSION.fullmatch(path.name)
        and path.name.startswith(version)
        and (path / "dataset_info.json").is_file()
    ]
    if versions:
        return max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
    known = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    raise UserError(
        f"data set {name!r} is not prepared: {parent / (version or '<version>')} with "
        f"a dataset_info.json was expected and is not there."
        f"{did_you_mean(base, ['digits', *(n for n in known if n != base)])} If it is "
        "in another folder, name that with --data-dir or TFDS_DATA_DIR. "
        f"{_how_to_prepare(name, root)}"
    )


def _how_to_prepare(name: str, root: Path | None = None) -> str:
    base = re.sub(r":.*|/\d+\.\d+\.\d+$", "", name)
    where = f", data_dir={str(root)!r}" if root else ""
    return (
        "To prepare it, once, with a network:\n"
        "  pip install 'bnjax[prepare]'  (in a clone: pip install '.[prepare]')\n"
        '  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({base!r}, file_format='array_record'{where})"
        '.download_and_prepare()"'
    )


def _fingerprint(folder: Path) -> str:
    """Digest what the files are: their names, sizes, times and descriptions."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _no_opencv_advice(record: logging.LogRecord) -> bool:
    return "OpenCV is not installed" not in record.getMessage()
