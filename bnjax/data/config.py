"""What a run is told about its data, and what is refused before anything starts."""

import dataclasses
import math
import operator
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
    """Refuse values no run can use, naming the flag."""
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
        ("validation_share", share is None or 0 < share < 1, "a share between 0 and 1"),
        ("image_size", size is None or size >= 1, "1 or more"),
        ("central_crop", 0 < data.central_crop <= 1, "a share in (0, 1]"),
        ("mean", finite, "a number, or one a channel"),
        ("std", positive, "a positive number, or one a channel"),
        ("augment.area", 0 < smallest <= largest <= 1, "two rising shares in (0, 1]"),
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
