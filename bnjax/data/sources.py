"""Where examples come from: digits, a tfds set, an image folder, random pixels."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from bnjax._files import cache_dir
from bnjax._validate import did_you_mean, first_line
from bnjax.data.augment import CentralCrop
from bnjax.data.config import DataConfig, DataError, SettingError

Report = Callable[[int, int], None]


class Arrays(NamedTuple):
    """Examples of one split.

    Args:
        images: shape (examples, ...), as the source stores them (uint8).
        labels: shape (examples,), int32.
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


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
        DataError: naming the example.
    """
    if not 0 <= label < classes:
        raise DataError(
            f"{where} has the label {label}; expected 0 to {classes - 1}. A split "
            "without labels cannot be trained or tested on: name another with "
            "--data.test-split, or prepare the set again."
        )


def check_damaged(damaged: Sequence[int], records: Records) -> None:
    """Refuse a set of which more than `DAMAGED_SHARE` is damaged.

    Raises:
        DataError: naming the first few.
    """
    if len(damaged) > DAMAGED_SHARE * len(records):
        named = "; ".join(records.where(row) for row in sorted(damaged)[:3])
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise DataError(
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
        DataError: too many images are damaged, or one has another shape or a wrong
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
        DataError: naming the image.
    """
    if image.shape != expected:
        raise DataError(
            f"{where} has the shape {image.shape}; expected {expected}. For images of "
            "many sizes give --data.image-size."
        )


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
            DataError: the files are damaged or missing.
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
            raise DataError(
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
        DataError: it is not there, or is no set of images with labels.
    """
    return open_directory(_find_folder(name, find_data_dir(data_dir)), name)


def open_directory(folder: Path, name: str | None = None) -> Prepared:
    """Open the prepared data set whose dataset_info.json lies in `folder`.

    Args:
        folder: of one version of a data set.
        name: for messages; the folder's path if None.

    Raises:
        DataError: it is damaged, or is no set of images with labels.
    """
    name = name or str(folder)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        info = builder.info
    except Exception as error:
        raise DataError(
            f"data set {name!r} in {folder} could not be opened: "
            f"{first_line(error)}. Its description is damaged: delete the folder and "
            f"prepare it again. {_how_to_prepare(name)}"
        ) from error
    return _check(name, folder, info)


def _check(name: str, folder: Path, info: Any) -> Prepared:
    """Refuse a data set that does not hold encoded images with labels."""
    where = f"data set {name!r} in {folder}"
    if info.file_format is None or info.file_format.value != "array_record":
        raise DataError(
            f"{where} is not stored as array_record, which reading it without "
            f"TensorFlow needs. {_how_to_prepare(name)}"
        )
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    features = dict(info.features)
    shape: Any = getattr(features.get("image"), "shape", ())
    classes = getattr(features.get("label"), "num_classes", None)
    names = getattr(features.get("label"), "names", None)
    if len(shape) != 3 or shape[-1] not in (1, 3) or classes is None:
        raise DataError(
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
    raise DataError(
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
            DataError: a file is gone, or may not be read.
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
        DataError: a folder is missing, empty or unreadable, or the splits have
            different classes.
    """
    names = [path.name for path in _list(root) if path.is_dir()]
    splits = [name for name in ("train", "test", "val", "validation") if name in names]
    if "train" not in splits or len(splits) < 2:
        raise DataError(
            f"{root} holds the folders {', '.join(sorted(names)) or '(none)'}. {LAYOUT}"
        )
    classes = _classes(root / "train")
    records = {}
    for split in splits:
        found = _classes(root / split)
        if found != classes:
            differing = sorted(set(found) ^ set(classes))
            raise DataError(
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
            raise DataError(
                f"class folder {folder / name} holds no image "
                f"({', '.join(SUFFIXES)}). Fill it, or remove the class everywhere."
            )
        files += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return FolderRecords(folder, tuple(files), tuple(labels))


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in _list(folder) if path.is_dir())
    if not names:
        raise DataError(f"{folder} holds no class folder. {LAYOUT}")
    return names


def _list(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}. Check that it is there "
        "and that its permissions let you read it."
    )


def cached(key: str, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept under `key`, or make them and keep them.

    Args:
        key: names the file; it must change whenever what `make` returns does.
        make: gives the arrays where there is no sound entry.
    """
    path = cache_dir() / f"{key}.npz"
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, NotImplementedError) as error:
            _note(f"cache {path} is damaged and is made again ({error})")
        except zipfile.BadZipFile as error:
            _note(f"cache {path} is damaged and is made again ({error})")
    arrays = make()
    try:
        _write(path, arrays)
    except OSError as error:
        _note(f"cache {path} could not be written; the next run decodes again: {error}")
    return arrays


def _read(path: Path) -> Arrays:
    # np.load leaves a file it was given by name open where it cannot read it.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
        return Arrays(entry["images"], entry["labels"])


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, images=arrays.images, labels=arrays.labels)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


R = TypeVar("R")
_SYNTHETIC = re.compile(
    r"synthetic(:(?P<shape>[1-9]\d*(x[1-9]\d*){1,2})"
    r"(:(?P<classes>[1-9]\d*)(:(?P<examples>[1-9]\d*))?)?)?"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that is there, not yet read.

    Args:
        name: what it is called in messages.
        splits: the examples of "train" and of "test".
        classes: how many labels there are, counted from 0.
        image_shape: of one example, as the model is given it.
        max_value: the largest value a pixel can take.
        resize: what makes a stored image one of `image_shape`; None where it is.
        cache_key: names the decoded arrays of a split; None where they are at hand.
        class_names: what the labels stand for; None where nothing says.
    """

    name: str
    splits: Mapping[str, Records]
    classes: int
    image_shape: tuple[int, ...]
    max_value: int = 255
    resize: CentralCrop | None = None
    cache_key: Callable[[str], str] | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Return how many examples each split has."""
        return {split: len(records) for split, records in self.splits.items()}

    def load(self, split: str, report: Report) -> Arrays:
        """Read a whole split, from the cache where it was decoded before.

        Args:
            split: "train" or "test".
            report: called with examples read and their total.

        Raises:
            DataError: it cannot be read.
        """
        records = self.splits[split]
        if isinstance(records, ArrayRecords):
            return records.arrays
        make = functools.partial(
            load_records, records, self.classes, self.image_shape, self.resize, report
        )
        return cached(self.cache_key(split), make) if self.cache_key else make()


def open_source(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    test_split: str = "test",
    central_crop: float = 0.875,
) -> Source:
    """Find a data set, reading no example and opening no connection.

    Args:
        name: "digits"; a prepared tfds data set, "mnist" or "mnist:3.0.1"; a folder,
            of such a set or of images; or "synthetic:32x32x3:10:5000", random pixels
            of a shape, of so many classes, so many examples.
        data_dir: where tfds data sets are prepared; see `prepared.find_data_dir`.
        image_size: height and width of the images; None: as they are stored.
        test_split: what to test on; where there is no "test", "validation".
        central_crop: share of the shorter side that is kept where images are resized.

    Raises:
        DataError: the data set is not prepared, or cannot be used here.

    Example:
        >>> source = open_source("digits")
        >>> source.sizes, source.image_shape, source.classes
        ({'train': 1442, 'test': 355}, (8, 8), 10)
        >>> source = open_source("synthetic:16x16x3:5:100")
        >>> source.sizes, source.image_shape, source.classes
        ({'train': 100, 'test': 100}, (16, 16, 3), 5)
    """
    resize = CentralCrop(image_size, central_crop) if image_size else None
    if name == "digits" or name.partition(":")[0] == "synthetic":
        source = _open_digits() if name == "digits" else _open_synthetic(name)
        if resize:
            raise SettingError(
                f"--data.image-size {image_size}: {name} is of one size; give none.",
            )
        return source
    if is_folder(name) and not (Path(name) / "dataset_info.json").is_file():
        return _open_image_folder(Path(name).expanduser(), resize, test_split)
    found = (
        open_directory(Path(name).expanduser())
        if is_folder(name)
        else open_prepared(name, data_dir)
    )
    splits = {split: found.records(split) for split in found.sizes}
    chosen = _choose(splits, test_split, f"data set {found.name}")
    shape = _image_shape(found.name, found.image_shape, resize)

    def cache_key(split: str) -> str:
        stored = chosen[split].split
        return _cache_key(found.name, stored, found.fingerprint(), resize)

    return Source(
        name=found.name,
        splits=chosen,
        classes=found.classes,
        image_shape=shape,
        resize=resize,
        cache_key=cache_key,
        class_names=found.class_names,
    )


def open_data(data: DataConfig, data_dir: Path | None = None) -> Source:
    """Find the data set that a configuration names; see `open_source`."""
    return open_source(
        data.name,
        data_dir,
        image_size=data.image_size,
        test_split=data.test_split,
        central_crop=data.central_crop,
    )


def is_folder(name: str) -> bool:
    """Say whether a source's name is a path: it is absolute, or begins with a dot.

    Example:
        >>> [is_folder(name) for name in ("./flowers", "/data/flowers", "mnist")]
        [True, True, False]
    """
    return name.startswith((".", "~")) or Path(name).is_absolute()


def _open_image_folder(
    root: Path, resize: CentralCrop | None, test_split: str
) -> Source:
    splits, classes = open_folder(root)
    shape = _image_shape(str(root), (None, None, CHANNELS), resize)

    def cache_key(split: str) -> str:
        return _cache_key(root.name, split, chosen[split].fingerprint(), resize)

    chosen = _choose(splits, test_split, str(root))
    return Source(
        name=str(root),
        splits=chosen,
        classes=len(classes),
        image_shape=shape,
        resize=resize,
        cache_key=cache_key,
        class_names=tuple(classes),
    )


def _choose(splits: dict[str, R], test_split: str, where: str) -> dict[str, R]:
    """Return the splits to train and to test on."""
    test = test_split
    if test == "test" and "test" not in splits:
        test = "validation"
    if "train" not in splits or test not in splits:
        raise DataError(
            f"{where} has the splits {', '.join(splits)}; expected train and "
            f"{test_split}. Name what to test on with --data.test-split."
        )
    return {"train": splits["train"], "test": splits[test]}


def _image_shape(
    where: str, stored: tuple[int | None, ...], resize: CentralCrop | None
) -> tuple[int, ...]:
    """Return the shape the model is given."""
    if resize:
        return (resize.size, resize.size, stored[-1] or CHANNELS)
    fixed = tuple(side for side in stored if side is not None)
    if len(fixed) != len(stored):
        raise SettingError(
            f"{where} holds images of many sizes: say with --data.image-size how high "
            "and wide the network is to be given them, such as 224.",
        )
    return fixed


def _cache_key(
    name: str, split: str, fingerprint: str, resize: CentralCrop | None
) -> str:
    size = f"-{resize.size}-{resize.share:g}" if resize else ""
    return f"{name.replace('/', '-')}-{split}{size}-{fingerprint}"


def stratified_test_mask(labels: np.ndarray, every: int = 5) -> np.ndarray:
    """Mark every fifth example of each class, in the order they come.

    No random number is drawn, so that the split is the same for every seed, machine
    and version of any library.

    Args:
        labels: shape (examples,).
        every: one example in this many is marked.

    Returns:
        Booleans, shape (examples,): True for the test set.

    Example:
        >>> stratified_test_mask(np.array([0, 1, 0, 1, 0, 0]), every=2).tolist()
        [False, False, True, True, False, True]
    """
    mask = np.zeros(labels.shape, bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        mask[places[every - 1 :: every]] = True
    return mask


def _open_digits() -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.uint8).reshape(-1, 8, 8)
    labels = labels.astype(np.int32)
    test = stratified_test_mask(labels)
    return Source(
        name="digits",
        splits={
            split: ArrayRecords("digits", Arrays(pixels[mask], labels[mask]))
            for split, mask in {"train": ~test, "test": test}.items()
        },
        classes=10,
        image_shape=(8, 8),
        max_value=16,
    )


def _open_synthetic(name: str) -> Source:
    """Return random pixels: the shape, classes and examples are in the name."""
    found = _SYNTHETIC.fullmatch(name)
    if not found:
        raise SettingError(
            f"data set {name!r}: expected synthetic:<height>x<width>x<channels>:"
            "<classes>:<examples>, all positive, such as synthetic:32x32x3:10:5000.",
        )
    shape = tuple(int(side) for side in (found["shape"] or "32x32x3").split("x"))
    classes, examples = int(found["classes"] or 10), int(found["examples"] or 1000)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, *shape), np.uint8)
    arrays = Arrays(images, rng.integers(0, classes, examples, np.int32))
    records = ArrayRecords(name, arrays)
    return Source(name, {"train": records, "test": records}, classes, shape)
