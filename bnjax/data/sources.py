"""Where examples come from: digits, a tfds set, an image folder, random pixels."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from bnjax.data import prepared
from bnjax.data.augment import CentralCrop
from bnjax.data.cache import cached
from bnjax.data.config import DataConfig
from bnjax.data.folder import CHANNELS, open_folder
from bnjax.data.records import ArrayRecords, Records, load_records
from bnjax.data.resident import Arrays, Report
from bnjax.training.errors import USAGE, UserError

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
            UserError: it cannot be read.
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
        UserError: the data set is not prepared, or cannot be used here.

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
            raise UserError(
                f"--data.image-size {image_size}: {name} is of one size; give none.",
                USAGE,
            )
        return source
    if is_folder(name) and not (Path(name) / "dataset_info.json").is_file():
        return _open_image_folder(Path(name).expanduser(), resize, test_split)
    found = (
        prepared.open_directory(Path(name).expanduser())
        if is_folder(name)
        else prepared.open_prepared(name, data_dir)
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
        raise UserError(
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
        raise UserError(
            f"{where} holds images of many sizes: say with --data.image-size how high "
            "and wide the network is to be given them, such as 224.",
            USAGE,
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
        raise UserError(
            f"data set {name!r}: expected synthetic:<height>x<width>x<channels>:"
            "<classes>:<examples>, all positive, such as synthetic:32x32x3:10:5000.",
            USAGE,
        )
    shape = tuple(int(side) for side in (found["shape"] or "32x32x3").split("x"))
    classes, examples = int(found["classes"] or 10), int(found["examples"] or 1000)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, *shape), np.uint8)
    arrays = Arrays(images, rng.integers(0, classes, examples, np.int32))
    records = ArrayRecords(name, arrays)
    return Source(name, {"train": records, "test": records}, classes, shape)
