"""What a run is told about its data, and what is refused before anything starts."""

import dataclasses
import math
from typing import Literal

Shuffle = Literal["global", "within-shard", "fixed-batches"]


class SettingError(ValueError):
    """A setting that no run can use; the message names its flag."""


class DataError(ValueError):
    """Data that are not there, or that cannot be used."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, drawn from seed, epoch and example."""

    kind: Literal["none", "shift", "crop"] = "none"
    """none: as they are.
    shift: padded, cut and mirrored, on the device, for small images.
    crop: a random part resized, mirrored, recoloured, on the host."""
    flip: bool = True
    """Mirror every other image, at random; not for digits and letters."""
    padding: int = 4
    """Of shift: pixels of padding, the most an image moves by."""
    area: tuple[float, float] = (0.08, 1.0)
    """Of crop: smallest and largest share of the image's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Of crop: smallest and largest width over height."""
    strength: float = 1.0
    """Of crop: how much colours change; 0: not at all. The paper reduces it."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it is read."""

    name: str = "digits"
    """The embedded "digits";
    a prepared tfds set by name, "mnist", "mnist:3.0.1", or by folder;
    a folder of images, train/<class> and val/<class>, "./flowers";
    "synthetic:32x32x3:10:5000": random pixels, classes, examples."""
    test_split: str = "test"
    """What to test on; where a set has no "test", its "validation" is taken."""
    validation_share: float | None = None
    """Of a folder of classes without train and val: the share to test on, as 0.2."""
    binarize: bool = False
    """Pixels above half of their range become 1, others 0; else scaled to [0, 1]."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from pixels in [0, 1]: one number, or one a channel."""
    std: tuple[float, ...] = (1.0,)
    """What pixels are then divided by: one number, or one a channel."""
    image_size: int | None = None
    """Height and width the network is given; None: as the images are stored."""
    central_crop: float = 0.875
    """Share of the shorter side that is kept in evaluation where images are resized."""
    apply_exif: bool = False
    """Turn images upright as their EXIF orientation says; else: as they are stored."""
    max_pixels: int = 2**27
    """Height times width of the largest image that is decoded."""
    path: Literal["auto", "resident", "streaming"] = "auto"
    """resident: the whole training set on the device.
    streaming: read as the run goes.
    auto: resident up to --data.resident-bytes and without crop."""
    resident_bytes: int = 2**30
    """The largest set, decoded, that auto, or an evaluation, holds on the device."""
    workers: int = 0
    """Of streaming: processes that read and decode; 0: threads of this one."""
    prefetch: int = 2
    """Of streaming: batches each worker, or this process, keeps ready."""
    shuffle: Shuffle = "global"
    """What is new in every epoch.
    global: the order of all examples.
    within-shard: that of stored runs, and that inside each.
    fixed-batches: that of batches whose examples always meet."""
    shard_size: int = 1000
    """Of within-shard: examples in a stored run."""
    augment: AugmentConfig = AugmentConfig()


INCIDENTAL = frozenset({"workers", "prefetch"})
"""Fields of `DataConfig` that no result depends on: a resumed run may change them."""


def validate_data(data: DataConfig) -> None:
    """Refuse values no run can use.

    Raises:
        SettingError: naming the flag, what was given and what was expected.

    Example:
        >>> validate_data(DataConfig(workers=-1))
        Traceback (most recent call last):
        bnjax.data.config.SettingError: --data.workers -1: expected 0 or more.
    """
    for name, least in (
        ("workers", 0),
        ("prefetch", 1),
        ("shard_size", 1),
        ("resident_bytes", 0),
        ("max_pixels", 1),
    ):
        if getattr(data, name) < least:
            _refuse(name, getattr(data, name), f"{least} or more")
    if data.validation_share is not None and not 0 < data.validation_share < 1:
        _refuse("validation_share", data.validation_share, "a share between 0 and 1")
    if data.image_size is not None and data.image_size < 1:
        _refuse("image_size", data.image_size, "1 or more")
    if not 0 < data.central_crop <= 1:
        _refuse("central_crop", data.central_crop, "a share in (0, 1]")
    if not data.mean or not all(map(math.isfinite, data.mean)):
        _refuse("mean", data.mean, "a number, or one a channel")
    if not data.std or not all(0 < value < math.inf for value in data.std):
        _refuse("std", data.std, "a positive number, or one a channel")
    augment = data.augment
    low, high = augment.area
    if not 0 < low <= high <= 1:
        _refuse("augment.area", augment.area, "two rising shares in (0, 1]")
    low, high = augment.aspect
    if not 0 < low <= high < math.inf:
        _refuse("augment.aspect", augment.aspect, "two rising positive numbers")
    if not 0 <= augment.strength <= 1:
        _refuse("augment.strength", augment.strength, "a number in [0, 1]")
    if augment.padding < 0:
        _refuse("augment.padding", augment.padding, "0 or more")


def check_images(data: DataConfig, image_shape: tuple[int, ...]) -> None:
    """Refuse settings that do not fit the images of a set.

    Args:
        data: validated.
        image_shape: (height, width) or (height, width, channels).

    Raises:
        SettingError: naming the flag, what was given and what was expected.
    """
    channels = image_shape[2] if len(image_shape) == 3 else 1
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) not in (1, channels):
            expected = f"one number, or {channels} for the channels of {image_shape}"
            _refuse(name, values, expected)
    if data.augment.kind == "crop":
        if data.path == "resident":
            _refuse("path", data.path, "streaming with --data.augment.kind crop")
        if image_shape[0] != image_shape[1]:
            expected = f"the side of a square: the images are {image_shape}"
            _refuse("image_size", data.image_size, expected)


def _refuse(field: str, value: object, expected: str) -> None:
    flag = "--data." + field.replace("_", "-")
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    raise SettingError(f"{flag} {shown}: expected {expected}.")
