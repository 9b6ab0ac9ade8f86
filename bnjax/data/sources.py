"""Sources of examples: digits, a tfds set, a folder of images, random pixels."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bnjax._files import cache_dir, replacing
from bnjax._validate import did_you_mean, first_line
from bnjax.data.config import DataConfig, DataError, SettingError
from bnjax.data.images import SUFFIXES, CentralCrop, decode_image, printable
from bnjax.data.records import (
    ArrayRecords,
    Arrays,
    Damage,
    Decode,
    FolderRecords,
    PreparedRecords,
    Records,
    check_classes,
    check_label,
    check_shape,
    how_to_prepare,
    note,
)

Report = Callable[[int, int], None]
S = TypeVar("S")

CHANNELS = 3
CHUNK = 500


# --- Sets that tfds prepared --------------------------------------------------------

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def find_data_dir(data_dir: Path | None = None) -> Path:
    """Return the given folder, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(given).expanduser()


def _find_prepared(name: str, data_dir: Path | None) -> Path:
    """Find a prepared set by its folders.

    tfds itself would try for minutes to download a missing set. The name is "mnist",
    "mnist:3.0.1" or "name/config"; `data_dir` may be the folder of the set.
    """
    root = find_data_dir(data_dir)
    base, _, version = name.partition(":")
    if data_dir is not None and (root / "dataset_info.json").is_file():
        return root
    own = data_dir is not None and root.name == base.rpartition("/")[2]
    parent = root if own else root / base
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
    hint = did_you_mean(base, ["digits", *(n for n in known if n != base)])
    if Path(name).is_dir():
        hint = f" If you mean the folder of that name here, write './{name}'."
    raise DataError(
        f"data set {name!r} is not prepared: there is no "
        f"{parent / (version or '<version>')} with a dataset_info.json.{hint} If the "
        "set is in another folder, give that folder as --data-dir or TFDS_DATA_DIR. "
        f"{how_to_prepare(name, root)}"
    )


def _open_prepared(folder: Path, name: str, data: DataConfig) -> "Source":
    """Open the prepared set with its dataset_info.json in `folder`."""
    import tensorflow_datasets as tfds

    where = f"data set {name!r} in {folder}"
    try:
        info = tfds.builder_from_directory(folder).info
    except Exception as error:
        raise DataError(
            f"{where} could not be opened: {first_line(error)}. Its description is "
            f"damaged: delete the folder and prepare it again. {how_to_prepare(name)}"
        ) from error
    if info.file_format is None or info.file_format.value != "array_record":
        raise DataError(
            f"{where} is not stored as array_record; reading another format would need "
            f"TensorFlow. {how_to_prepare(name)}"
        )
    features: Any = info.features
    image, label = (dict(features).get(name) for name in ("image", "label"))
    shape: Any = getattr(image, "shape", ())
    classes, names = (getattr(label, n, None) for n in ("num_classes", "names"))
    if len(shape) != 3 or shape[-1] not in (1, 3) or not classes:
        raise DataError(
            f"{where} has the features {info.features}; expected an image of 1 or 3 "
            "channels and a class label."
        )
    if classes < 2:
        raise DataError(f"{where} has one class, so that there is nothing to learn.")
    full, decode = info.full_name, _decoder(data, shape[-1])
    splits = {
        name: PreparedRecords(full, folder, name, split.num_examples, decode)
        for name, split in info.splits.items()
    }
    return Source(
        name=full,
        splits=_choose(splits, data.test_split, f"data set {full}"),
        classes=classes,
        image_shape=_given_shape(full, tuple(shape), data),
        resize=_resize(data),
        decode=decode,
        class_names=tuple(names) if names else None,
    )


# --- Folders of images --------------------------------------------------------------

LAYOUT = (
    "Expected train/<class>/*.jpg, and test/<class>/*.jpg or val/<class>/*.jpg with "
    "the same classes; or <class>/*.jpg and --data.validation-share 0.2."
)


def _open_folder(root: Path, data: DataConfig) -> "Source":
    """List the images of every split without opening them.

    `root` has a folder for each split, with a folder for each class. Or it has the
    folders of the classes, and `data.validation_share` says how to split them.
    """
    where, share = printable(root), data.validation_share
    names = [entry.name for entry in _scan(root) if _is_folder(entry)]
    splits = [name for name in ("train", "test", "val", "validation") if name in names]
    left_out: list[str] = []
    if share is not None:
        if splits:
            raise SettingError(
                f"--data.validation-share {share}: {where} already has the splits "
                f"{', '.join(splits)}. Omit the flag."
            )
        listed = _divide(_list_classes(root, left_out), share)
        folders = dict.fromkeys(listed, root)
    elif "train" in splits and len(splits) > 1:
        folders = {"validation" if s == "val" else s: root / s for s in splits}
        listed = {s: _list_classes(folders[s], left_out) for s in folders}
    else:
        shown = ", ".join(map(printable, sorted(names))) or "(none)"
        raise DataError(f"{where} holds the folders {shown}. {LAYOUT}")
    for split, found in listed.items():
        if differing := sorted(set(found) ^ set(listed["train"])):
            raise DataError(
                f"{printable(folders[split])} and {printable(folders['train'])} have "
                f"different classes: {', '.join(map(printable, differing[:5]))} is in "
                f"only one of them. {LAYOUT}"
            )
    if left_out:
        note(
            f"{where}: {len(left_out):,} files and folders are skipped, because their "
            f"names do not end like images, such as {left_out[0]}"
        )
    decode, records = _decoder(data, CHANNELS), {}
    for split, found in listed.items():
        files = tuple(f"{name}/{file}" for name in found for file in found[name])
        labels = tuple(i for i, name in enumerate(found) for _ in found[name])
        records[split] = FolderRecords(
            printable(root.name), split, folders[split], files, labels, decode
        )
    class_names = tuple(map(printable, listed["train"]))
    chosen = _choose(records, data.test_split, where)
    for split, each in chosen.items():
        check_classes(np.array(each.labels), class_names, split, where)
    return Source(
        name=where,
        splits=chosen,
        classes=len(class_names),
        image_shape=_given_shape(where, (None, None, CHANNELS), data),
        resize=_resize(data),
        decode=decode,
        class_names=class_names,
    )


def _list_classes(folder: Path, left_out: list[str]) -> dict[str, list[str]]:
    """Return the names of the images of each class, both sorted."""
    found = {}
    for entry in sorted(_scan(folder), key=lambda entry: entry.name):
        if not _is_folder(entry):
            left_out.append(printable(entry.path))
            continue
        images = []
        for each in _scan(Path(entry)):
            # A broken link is not a folder; reading it reports a damaged image.
            if each.name.lower().endswith(SUFFIXES) and not _is_folder(each):
                images.append(each.name)
            else:
                left_out.append(printable(each.path))
        if not images:
            raise DataError(
                f"class folder {printable(entry.path)} holds no image "
                f"({', '.join(SUFFIXES)}). Add images, or remove the class everywhere."
            )
        found[entry.name] = sorted(images)
    if not found:
        raise DataError(f"{printable(folder)} holds no class folder. {LAYOUT}")
    return found


def _divide(
    listed: dict[str, list[str]], share: float
) -> dict[str, dict[str, list[str]]]:
    """Return the images of the classes as two splits, "train" and "validation"."""
    train, test = {}, {}
    for name, files in listed.items():
        mask = stratified_test_mask(np.zeros(len(files)), share)
        train[name] = list(itertools.compress(files, ~mask))
        test[name] = list(itertools.compress(files, mask))
    return {"train": train, "validation": test}


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{printable(folder)} cannot be read: {error.strerror or error}. Check "
            "that it exists and that you have permission to read it. If the data set "
            "has moved, give its folder as --data-dir."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A circular link is not a folder.
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


# --- Decoded arrays, kept between runs ----------------------------------------------


_UNREADABLE = (OSError, ValueError, KeyError, EOFError, NotImplementedError)


def cached(key: str, make: Callable[[], Arrays]) -> Arrays:
    """Return the cached arrays of `key`, or make and cache them.

    The key must change whenever the result of `make` changes.
    """
    path = cache_dir() / f"{key}.npz"
    if path.exists():
        # np.load does not close a file that it opened by name if reading fails.
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
                return Arrays(entry["images"], entry["labels"])
        except (*_UNREADABLE, zipfile.BadZipFile) as error:
            note(f"cache {path} is damaged; the data are decoded again ({error})")
    arrays = make()
    try:
        # Private, as the XDG specification requires: the images may be private.
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            np.savez(file, images=arrays.images, labels=arrays.labels)
    except OSError as error:
        note(f"cache {path} could not be written; the next run decodes again: {error}")
    return arrays


# --- Sources ------------------------------------------------------------------------

_SYNTHETIC = re.compile(
    r"synthetic(:(?P<shape>[1-9]\d*(x[1-9]\d*){1,2})"
    r"(:(?P<classes>[1-9]\d*)(:(?P<examples>[1-9]\d*))?)?)?"
)


_DESCRIBED = ("name", "image_shape", "classes", "max_value", "class_names")


@dataclasses.dataclass(frozen=True)
class Source:
    """An existing data set, not yet read.

    Attributes:
        name: the name of the set.
        splits: the examples of "train" and of "test".
        classes: the number of classes.
        image_shape: the shape of the model's images.
        decode: the function that decodes a stored image.
        max_value: the largest value of a pixel.
        resize: the function that resizes a stored image to `image_shape`, or None.
        class_names: the names of the classes, if they are known.
    """

    name: str
    splits: Mapping[str, Records]
    classes: int
    image_shape: tuple[int, ...]
    decode: Decode
    max_value: int = 255
    resize: CentralCrop | None = None
    class_names: tuple[str, ...] | None = None

    @classmethod
    def from_description(
        cls, data: DataConfig, description: Mapping[str, Any]
    ) -> "Source":
        """Return a data set without examples, which is enough to build a network."""
        described: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in {"name": data.name, **description}.items()
            if name in _DESCRIBED
        }
        shape = described["image_shape"]
        decode = _decoder(data, shape[2] if len(shape) == 3 else 1)
        return cls(splits={}, decode=decode, resize=_resize(data), **described)

    @property
    def description(self) -> dict[str, Any]:
        """Return the description of the data in a run's config.json, as JSON."""
        described = {name: getattr(self, name) for name in _DESCRIBED}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in described.items()
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of examples of each split."""
        return {split: len(records) for split, records in self.splits.items()}

    @property
    def files(self) -> dict[str, str]:
        """Return the number of files of each split and a digest of their names.

        Empty if the data set is not a folder of images.
        """
        return {
            split: f"{len(records)} files, {records.names_digest()}"
            for split, records in self.splits.items()
            if isinstance(records, FolderRecords)
        }

    def cache_key(self, split: str) -> str:
        """Return a name that depends on the decoded arrays of a split."""
        records = self.splits[split]
        if not isinstance(records, PreparedRecords | FolderRecords):
            return self.name
        size = f"-{self.resize.size}-{self.resize.share:g}" if self.resize else ""
        return f"{records.cache_key()}{size}"

    def load(self, split: str, report: Report) -> Arrays:
        """Read a whole split, from the cache if it was decoded before.

        Damaged images are left out. `report` gets the number of examples read and their
        total.
        """
        records = self.splits[split]
        make = functools.partial(self._decode_all, split, report)
        if isinstance(records, ArrayRecords):
            arrays = records.arrays
        elif isinstance(records, PreparedRecords | FolderRecords):
            arrays = cached(self.cache_key(split), make)
        else:
            arrays = make()
        if not isinstance(records, FolderRecords):
            names = self.class_names or tuple(map(str, range(self.classes)))
            check_classes(arrays.labels, names, split, self.name)
        return arrays

    def _decode_all(self, split: str, report: Report) -> Arrays:
        records = self.splits[split]
        total, damage, kept = len(records), Damage(records), 0
        images = np.empty((total, *self.image_shape), np.uint8)
        labels = np.empty(total, np.int32)
        for start in range(0, total, CHUNK):
            rows = range(start, min(start + CHUNK, total))
            for row, example in zip(rows, records.read(rows), strict=True):
                if example.image is None:
                    damage.add({row: example.problem})
                else:
                    images[kept] = self.fit(example.image, records.where(row))
                    check_label(example.label, self.classes, records.where(row))
                    labels[kept] = example.label
                    kept += 1
            report(rows.stop, total)
        return Arrays(images[:kept], labels[:kept])

    def fit(self, image: np.ndarray, where: str) -> np.ndarray:
        """Return an image as in evaluation; refuse another size."""
        image = self.resize(image) if self.resize else image
        check_shape(image, self.image_shape, where)
        return image


def open_data(data: DataConfig, data_dir: Path | None = None) -> Source:
    """Find the data set of a configuration, without reading an image.

    Args:
        data: the name of the set, and how to read it.
        data_dir: the folder of prepared tfds sets, see `find_data_dir`. If the name is
            a folder, the place of that folder now: the folder itself, or its parent.

    Returns:
        The data set.

    Raises:
        DataError: if the set does not exist or cannot be used.
    """
    if data.name == "digits" or data.name.partition(":")[0] == "synthetic":
        if data.image_size:
            raise SettingError(
                f"--data.image-size {data.image_size}: the images of {data.name} have "
                "one size. Omit the flag.",
            )
        return _open_digits() if data.name == "digits" else _open_synthetic(data.name)
    if not is_folder(data.name):
        return _open_prepared(_find_prepared(data.name, data_dir), data.name, data)
    folder = _find_folder(Path(data.name).expanduser(), data_dir)
    if (folder / "dataset_info.json").is_file():
        return _open_prepared(folder, printable(folder), data)
    return _open_folder(folder, data)


def open_source(name: str, data_dir: Path | None = None, **settings: Any) -> Source:
    """Find a data set by its name, with other fields of `DataConfig`."""
    return open_data(DataConfig(name=name, **settings), data_dir)


def is_folder(name: str) -> bool:
    """Return whether a source's name is a path: absolute, or with a dot in front."""
    return name.startswith((".", "~")) or Path(name).is_absolute()


def absolute_name(data: DataConfig) -> DataConfig:
    """Return a configuration that finds its folder from any working directory."""
    name = str(_absolute(Path(data.name))) if is_folder(data.name) else data.name
    return dataclasses.replace(data, name=name)


def _absolute(path: Path) -> Path:
    # Keep links, because the name is the user's choice.
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100


def _find_folder(named: Path, data_dir: Path | None) -> Path:
    """Return the present folder of a set whose name is a folder.

    The longest end of the name that exists below `data_dir` wins; then `data_dir`
    itself, if it looks like a set or has the last part of the name.
    """
    if data_dir is None:
        return named
    root, parts = data_dir.expanduser(), _absolute(named).parts[1:]
    for i in range(len(parts)):
        if (below := root.joinpath(*parts[i:])).is_dir():
            return below
    marks = (root / "train", root / "dataset_info.json")
    own = root.name == named.name or any(mark.exists() for mark in marks)
    return root if own or (root.is_dir() and not named.is_dir()) else named


def _decoder(data: DataConfig, channels: int) -> Decode:
    return functools.partial(
        decode_image,
        channels=channels,
        max_pixels=data.max_pixels,
        apply_exif=data.apply_exif,
    )


def _resize(data: DataConfig) -> CentralCrop | None:
    return CentralCrop(data.image_size, data.central_crop) if data.image_size else None


def _choose(splits: dict[str, S], test_split: str, where: str) -> dict[str, S]:
    """Return the splits to train and to test on."""
    found = "test" in splits or test_split != "test"
    test = test_split if found else "validation"
    if not {"train", test} <= splits.keys():
        raise DataError(
            f"{where} has the splits {', '.join(splits)}; expected train and "
            f"{test_split}. Give the split to test on as --data.test-split."
        )
    return {"train": splits["train"], "test": splits[test]}


def _given_shape(
    where: str, stored: tuple[Any, ...], data: DataConfig
) -> tuple[int, ...]:
    """Return the shape of the model's images."""
    if data.image_size:
        return (data.image_size, data.image_size, stored[-1] or CHANNELS)
    if None in stored:
        raise SettingError(
            f"{where} holds images of many sizes: give the height and width of the "
            "network's images as --data.image-size, such as 224.",
        )
    return stored


def stratified_test_mask(labels: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Mark a fraction of each class, evenly spread over the examples in their order.

    The function draws no random numbers. The split is therefore the same for every
    seed, machine and version of any library.
    """
    mask = np.zeros(labels.shape, bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        # Rounded, because 0.2 times 15 is a little more than 3.
        quota = np.floor(np.round(share * np.arange(len(places) + 1), 9))
        mask[places] = np.diff(quota) > 0
    return mask


def _open_digits() -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.uint8).reshape(-1, 8, 8)
    labels = labels.astype(np.int32)
    test = stratified_test_mask(labels)
    splits = {
        split: ArrayRecords("digits", Arrays(pixels[mask], labels[mask]))
        for split, mask in {"train": ~test, "test": test}.items()
    }
    return Source("digits", splits, 10, (8, 8), _decoder(DataConfig(), 1), 16)


def _open_synthetic(name: str) -> Source:
    """Return random pixels; the name gives the shape, classes and examples."""
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
    decode = _decoder(DataConfig(), shape[2] if len(shape) == 3 else 1)
    return Source(name, {"train": records, "test": records}, classes, shape, decode)
