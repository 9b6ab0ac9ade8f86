"""The data settings of a run, and checks before the run starts."""

import dataclasses
import math
import operator
from typing import Literal

Shuffle = Literal["global", "within-shard", "fixed-batches"]


class SettingError(ValueError):
    """A setting that no run can use; the message names its flag."""


class DataError(ValueError):
    """Data do not exist or cannot be used."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images; they depend on seed, epoch and example."""

    kind: Literal["none", "shift", "crop"] = "none"
    """none: do not change images.
    shift: pad, cut and mirror on the device, for small images.
    crop: resize a random part, mirror it and change its colors, on the host."""
    flip: bool = True
    """Mirror half of the images at random; turn this off for digits and letters."""
    padding: int = 4
    """For shift: pixels of padding, the largest distance that an image moves."""
    area: tuple[float, float] = (0.08, 1.0)
    """For crop: the smallest and largest fraction of the image's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """For crop: the smallest and largest ratio of width to height."""
    strength: float = 1.0
    """For crop: how much colors change, from 0 (not at all). The paper reduces it."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set, and how to read it."""

    name: str = "digits"
    """"digits": an embedded set of 1,797 images of 8x8.
    "mnist", "mnist:3.0.1" or a folder: a prepared tfds set.
    "./flowers": a folder of images, with train/<class> and val/<class>.
    "synthetic:32x32x3:10:5000": random pixels, number of classes and examples."""
    test_split: str = "test"
    """The split to test on. A set without "test" uses its "validation" instead."""
    validation_share: float | None = None
    """For a folder without train and val: the fraction to test on, such as 0.2."""
    binarize: bool = False
    """Set pixels above half of their range to 1, other pixels to 0.
    Without this flag, pixels are scaled to [0, 1]."""
    mean: tuple[float, ...] = (0.0,)
    """Subtract this from pixels in [0, 1]: one number, or one for each channel."""
    std: tuple[float, ...] = (1.0,)
    """Divide pixels by this afterwards: one number, or one for each channel."""
    image_size: int | None = None
    """Height and width of the network's images. None: as the images are stored."""
    central_crop: float = 0.875
    """The fraction of the shorter side that evaluation keeps, if images are resized."""
    apply_exif: bool = False
    """Rotate images by their EXIF orientation; otherwise they stay as stored."""
    max_pixels: int = 2**27
    """Do not decode images with more pixels (height times width) than this."""
    path: Literal["auto", "resident", "streaming"] = "auto"
    """resident: keep the whole training set on the device.
    streaming: read examples during the run.
    auto: resident up to --data.resident-bytes and without crop, else streaming."""
    resident_bytes: int = 2**30
    """Largest decoded set that auto or an evaluation keeps on the device, in bytes."""
    workers: int = 0
    """For streaming: processes that read and decode. 0: threads of this process."""
    prefetch: int = 2
    """For streaming: batches that each worker, or this process, reads ahead."""
    shuffle: Shuffle = "global"
    """What changes in every epoch.
    global: the order of all examples.
    within-shard: the order of the stored shards, and of the examples in each.
    fixed-batches: the order of batches whose examples stay together."""
    shard_size: int = 1000
    """For within-shard: the number of examples in a shard."""
    augment: AugmentConfig = AugmentConfig()


INCIDENTAL = frozenset({"workers", "prefetch"})
"""Fields of `DataConfig` that do not affect results; a resumed run may change them."""


def validate_data(data: DataConfig) -> None:
    """Refuse values that no run can use; the message names the flag."""
    share, size, augment = data.validation_share, data.image_size, data.augment
    (smallest, largest), (narrowest, widest) = augment.area, augment.aspect
    finite = data.mean and all(map(math.isfinite, data.mean))
    positive = data.std and all(0 < value < math.inf for value in data.std)
    _check(
        data,
        ("workers", data.workers >= 0, "0 or more"),
        ("prefetch", data.prefetch >= 1, "1 or more"),
        ("shard_size", data.shard_size >= 1, "1 or more"),
        ("resident_bytes", data.resident_bytes >= 0, "0 or more"),
        ("max_pixels", data.max_pixels >= 1, "1 or more"),
        ("validation_share", share is None or 0 < share < 1, "between 0 and 1"),
        ("image_size", size is None or size >= 1, "1 or more"),
        ("central_crop", 0 < data.central_crop <= 1, "a number in (0, 1]"),
        ("mean", finite, "a number, or one for each channel"),
        ("std", positive, "a positive number, or one for each channel"),
        ("augment.area", 0 < smallest <= largest <= 1, "two rising numbers in (0, 1]"),
        (
            "augment.aspect",
            0 < narrowest <= widest < math.inf,
            "two rising positive numbers",
        ),
        ("augment.strength", 0 <= augment.strength <= 1, "a number in [0, 1]"),
        ("augment.padding", augment.padding >= 0, "0 or more"),
    )


def check_images(data: DataConfig, image_shape: tuple[int, ...]) -> None:
    """Refuse settings that do not fit images of (height, width[, channels])."""
    channels = image_shape[2] if len(image_shape) == 3 else 1
    crop, square = data.augment.kind == "crop", image_shape[0] == image_shape[1]
    numbers = f"one number, or {channels} for the channels of {image_shape}"
    side = f"the side of a square: the images are {image_shape}"
    streaming = "streaming with --data.augment.kind crop"
    _check(
        data,
        ("mean", len(data.mean) in (1, channels), numbers),
        ("std", len(data.std) in (1, channels), numbers),
        ("path", not crop or data.path != "resident", streaming),
        ("image_size", not crop or square, side),
    )


def _check(data: DataConfig, *rules: tuple[str, object, str]) -> None:
    """Refuse the first field whose rule does not hold."""
    for field, holds, expected in rules:
        if not holds:
            value = operator.attrgetter(field)(data)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            flag = "--data." + field.replace("_", "-")
            raise SettingError(f"{flag} {shown}: expected {expected}.")
