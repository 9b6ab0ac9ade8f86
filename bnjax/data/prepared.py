"""Prepared TensorFlow Datasets, read without TensorFlow and without a network."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnjax._validate import did_you_mean
from bnjax.data.records import Example, decode_image
from bnjax.training.errors import UserError, first_line

_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set, not yet read.

    Args:
        name: with its version.
        folder: where its files are.
        sizes: examples in each split.
        classes: how many labels there are.
        image_shape: height and width, None where they vary, and channels.
        class_names: of the labels; None where the set does not say.
    """

    name: str
    folder: Path
    sizes: dict[str, int]
    classes: int
    image_shape: tuple[int | None, ...]
    class_names: tuple[str, ...] | None = None

    def records(self, split: str) -> "PreparedRecords":
        """Return the examples of one split, one by one."""
        return PreparedRecords(self, split)

    def fingerprint(self) -> str:
        """Digest what the files are: their names, sizes, times and descriptions."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            status = path.stat()
            line = f"{path.name} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode())
            if path.suffix == ".json":
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


class PreparedRecords:
    """The examples of one split, read by tfds and decoded by OpenCV.

    Args:
        prepared: the data set.
        split: of it.
    """

    def __init__(self, prepared: Prepared, split: str) -> None:
        self._prepared = prepared
        self.split = split

    def __len__(self) -> int:
        """Return how many there are."""
        return self._prepared.sizes[self.split]

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Read and decode some examples.

        Raises:
            UserError: the files are damaged or missing.
        """
        prepared = self._prepared
        channels = prepared.image_shape[-1] or 1
        try:
            found = self._source.__getitems__(list(rows))
            return [
                Example(decode_image(one["image"], channels), int(one["label"]))
                for one in found
            ]
        except Exception as error:
            raise UserError(
                f"data set {prepared.name!r} in {prepared.folder} could not be read: "
                f"{first_line(error)}. Its files are damaged or missing: delete "
                f"the folder and prepare it again. {_how_to_prepare(prepared.name)}"
            ) from error

    def where(self, row: int) -> str:
        """Name the record."""
        prepared = self._prepared
        return f"record {row} of {self.split} of {prepared.name} in {prepared.folder}"

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._prepared.folder)
        decoders = {"image": tfds.decode.SkipDecoding()}
        source: Any = builder.as_data_source
        return source(split=self.split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out."""
        return {"_prepared": self._prepared, "split": self.split}


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
        UserError: it is not there, or is no set of images with labels.
    """
    return open_directory(_find_folder(name, find_data_dir(data_dir)), name)


def open_directory(folder: Path, name: str | None = None) -> Prepared:
    """Open the prepared data set whose dataset_info.json lies in `folder`.

    Args:
        folder: of one version of a data set.
        name: for messages; the folder's path if None.

    Raises:
        UserError: it is damaged, or is no set of images with labels.
    """
    name = name or str(folder)
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
    return _check(name, folder, info)


def _check(name: str, folder: Path, info: Any) -> Prepared:
    """Refuse a data set that does not hold encoded images with labels."""
    where = f"data set {name!r} in {folder}"
    if info.file_format is None or info.file_format.value != "array_record":
        raise UserError(
            f"{where} is not stored as array_record, which reading it without "
            f"TensorFlow needs. {_how_to_prepare(name)}"
        )
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    features = dict(info.features)
    shape: Any = getattr(features.get("image"), "shape", ())
    classes = getattr(features.get("label"), "num_classes", None)
    names = getattr(features.get("label"), "names", None)
    if len(shape) != 3 or shape[-1] not in (1, 3) or classes is None:
        raise UserError(
            f"{where} has the features {info.features}; expected an image of 1 or 3 "
            "channels and a class label."
        )
    names = tuple(names) if names else None
    return Prepared(info.full_name, folder, sizes, classes, tuple(shape), names)


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
