"""Where examples come from: the embedded digits, or a prepared tfds data set."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from bnjax.data import prepared
from bnjax.data.resident import Arrays

Report = Callable[[int, int], None]


class Load(Protocol):
    """Reads one split; `report(done, total)` is called now and then."""

    def __call__(self, split: str, report: Report) -> Arrays:
        """Return the arrays of "train" or "test"."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that is there, not yet read.

    Args:
        name: what it is called in messages.
        sizes: examples in "train" and in "test".
        classes: how many labels there are, counted from 0.
        image_shape: of one example.
        max_value: the largest value a pixel can take.
        load: reads one split.
    """

    name: str
    sizes: dict[str, int]
    classes: int
    image_shape: tuple[int, ...]
    max_value: int
    load: Load


def open_source(name: str, data_dir: Path | None = None) -> Source:
    """Find a data set, reading no example and opening no connection.

    Args:
        name: "digits", or a prepared tfds data set: "mnist", "mnist:3.0.1".
        data_dir: where tfds data sets are prepared; see `prepared.find_data_dir`.

    Raises:
        UserError: the data set is not prepared, or cannot be used here.

    Example:
        >>> source = open_source("digits")
        >>> source.sizes, source.image_shape, source.classes
        ({'train': 1442, 'test': 355}, (8, 8), 10)
    """
    if name == "digits":
        return _open_digits()
    found = prepared.open_prepared(name, data_dir)
    return Source(
        name=found.name,
        sizes=found.sizes,
        classes=found.classes,
        image_shape=found.image_shape,
        max_value=255,
        load=found.load,
    )


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
    test = stratified_test_mask(labels)
    chosen = {"train": ~test, "test": test}

    def load(split: str, report: Report) -> Arrays:  # noqa: ARG001 (instant)
        mask = chosen[split]
        pixels = images[mask].astype(np.uint8).reshape(-1, 8, 8)
        return Arrays(pixels, labels[mask].astype(np.int32))

    return Source(
        name="digits",
        sizes={split: int(mask.sum()) for split, mask in chosen.items()},
        classes=10,
        image_shape=(8, 8),
        max_value=16,
        load=load,
    )
