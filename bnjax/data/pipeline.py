"""What feeds the steps of a run: one interface, whether the data fit the device or not.

A feed cuts the training set into the chunks that one dispatch takes, on the host, and
makes a batch of each item of a chunk, on the device.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.data.augment import HostTransform, RandomResizedCrop
from bnjax.data.config import DataConfig, check_images
from bnjax.data.order import HostOrder
from bnjax.data.resident import Arrays, EpochOrder, Report, ToInputs
from bnjax.data.small_images import shift_and_mirror
from bnjax.data.sources import Source
from bnjax.data.streaming import HostBatches, StreamingFeed
from bnjax.training.config import Config


class Feed(Protocol):
    """The batches of a run, in order.

    Args:
        constants: arrays that every dispatch is given: the resident set, or nothing.
        steps_per_epoch: how many steps an epoch has.
        chunk_steps: the most steps that one chunk should hold.
    """

    constants: Any
    steps_per_epoch: int
    chunk_steps: int

    def chunk(self, step: int, steps: int) -> Any:
        """Return what `steps` steps from step `step` take, as host arrays.

        Args:
            step: steps already taken.
            steps: how many follow.

        Returns:
            A tree of arrays of shape (steps, local batch, ...).
        """
        ...

    def spec(self, steps: int) -> Any:
        """Return the shapes and dtypes of a chunk, drawing none."""
        ...

    def batch(self, constants: Any, item: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Make one item of a chunk a batch; a pure function of its arguments.

        Args:
            constants: the feed's, on the device.
            item: one step's part of a chunk, or a device's part of that.
            key: of the step's randomness, the same on every device.

        Returns:
            "image", shape (batch, ...) and floating, and "label", shape (batch,).
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs beside the step, as JSON holds it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        ...

    def close(self) -> None:
        """Let go of files and worker processes."""
        ...


class Order(Protocol):
    """Which examples meet in which batch."""

    @property
    def batch_size(self) -> int:
        """Return how many examples a step takes."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Return how many steps an epoch has."""
        ...

    def rows(self, first: int, steps: int) -> np.ndarray:
        """Return the indices of some steps, shape (steps, batch_size)."""
        ...


class ResidentFeed:
    """The whole set on the device; a chunk holds indices.

    Args:
        arrays: the training set.
        order: which examples each step takes.
        to_batch: makes a batch of images, labels, rows and the step's key.
        shards: how many hosts share a batch.
        shard: which of them this is.
    """

    chunk_steps = 2**30

    def __init__(
        self,
        arrays: Arrays,
        order: Order,
        to_batch: Callable[[Any, jax.Array], dict[str, jax.Array]],
        *,
        shards: int = 1,
        shard: int = 0,
    ) -> None:
        self.constants = arrays
        self.steps_per_epoch = order.steps_per_epoch
        self._order = order
        self._to_batch = to_batch
        self._shards = shards
        self._shard = shard
        # The first draw compiles; that is no part of a step.
        order.rows(0, 1)

    def chunk(self, step: int, steps: int) -> np.ndarray:
        """Return indices, int32 of shape (steps, local batch)."""
        rows = self._order.rows(step, steps)
        return np.split(rows, self._shards, axis=1)[self._shard]

    def spec(self, steps: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the indices."""
        local = self._order.batch_size // self._shards
        return jax.ShapeDtypeStruct((steps, local), np.int32)

    def batch(
        self, constants: Arrays, item: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Gather the rows and convert them."""
        images = jnp.asarray(constants.images)[item]
        labels = jnp.asarray(constants.labels)[item]
        return self._to_batch({"image": images, "label": labels, "row": item}, key)

    def state(self) -> dict[str, Any]:
        """Return nothing: the step says it all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Have nothing to go back to."""

    def close(self) -> None:
        """Hold nothing open."""


def make_feed(
    config: Config,
    source: Source,
    epoch_key: Callable[[int], jax.Array],
    *,
    shards: int = 1,
    shard: int = 0,
    report: Report = lambda done, total: None,  # noqa: ARG005
) -> Feed:
    """Return what feeds the steps of a run.

    Args:
        config: of the run; `shards` divides its batch size.
        source: the data set.
        epoch_key: gives the random key of an epoch, counted from 0.
        shards: how many hosts share a batch.
        shard: which of them this is, counted from 0.
        report: called with examples read and their total, where that takes a while.

    Returns:
        A feed whose chunks hold this host's part of each batch.

    Raises:
        UserError: the settings do not fit the data, or these cannot be read.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> config = Config(steps=10, batch_size=100, learning_rate=0.1)
        >>> feed = make_feed(config, open_source("digits"), jax.random.key)
        >>> feed.chunk(0, 3).shape, feed.steps_per_epoch
        ((3, 100), 14)
        >>> batch = feed.batch(feed.constants, feed.chunk(0, 1)[0], jax.random.key(0))
        >>> batch["image"].shape, batch["label"].shape
        ((100, 8, 8), (100,))
    """
    data = config.data
    check_images(data, source.image_shape)
    words = tuple(int(word) for word in np.asarray(jax.random.key_data(epoch_key(0))))
    to_batch = make_to_batch(data, make_to_inputs(data, source.max_value))
    if choose_path(data, source) == "streaming":
        order = HostOrder(
            words,
            source.sizes["train"],
            config.batch_size,
            shuffle=data.shuffle,
            shard_size=data.shard_size,
        )
        batches = HostBatches(
            source.splits["train"],
            order,
            host_transform(data, source),
            source.classes,
            source.image_shape,
            shards=shards,
            shard=shard,
        )
        return StreamingFeed(
            batches, to_batch, workers=data.workers, prefetch=data.prefetch
        )
    arrays = source.load("train", report)
    examples = len(arrays.labels)
    if data.shuffle == "global":
        order = EpochOrder(epoch_key, examples, config.batch_size)
    else:
        order = HostOrder(
            words,
            examples,
            config.batch_size,
            shuffle=data.shuffle,
            shard_size=data.shard_size,
        )
    return ResidentFeed(arrays, order, to_batch, shards=shards, shard=shard)


def choose_path(data: DataConfig, source: Source) -> Literal["resident", "streaming"]:
    """Return the path that is asked for, or that the size of the set calls for.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> choose_path(DataConfig(), open_source("digits"))
        'resident'
        >>> choose_path(DataConfig(resident_bytes=10_000), open_source("digits"))
        'streaming'
    """
    if data.path != "auto":
        return data.path
    size = source.sizes["train"] * math.prod(source.image_shape)
    fits = size <= data.resident_bytes and data.augment.kind != "crop"
    return "resident" if fits else "streaming"


def make_to_inputs(data: DataConfig, max_value: int) -> ToInputs:
    """Return what makes stored pixels the network's inputs."""
    return ToInputs(max_value, binarize=data.binarize, mean=data.mean, std=data.std)


def make_to_batch(
    data: DataConfig, to_inputs: ToInputs
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """Return what the device does to images, labels and rows to make them a batch.

    The randomness of an example follows from the step's key and its row, wherever in
    the batch, and on whichever device, it is.
    """

    def to_batch(item: Any, key: jax.Array) -> dict[str, jax.Array]:
        images = item["image"]
        if data.augment.kind == "shift":
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(item["row"])
            images = shift_and_mirror(
                images, keys, padding=data.augment.padding, flip=data.augment.flip
            )
        return {"image": to_inputs(images), "label": item["label"]}

    return to_batch


def host_transform(data: DataConfig, source: Source) -> HostTransform | None:
    """Return what the host does to a stored training image; None if nothing."""
    augment = data.augment
    if augment.kind == "crop":
        return RandomResizedCrop(
            size=source.image_shape[0],
            area=augment.area,
            aspect=augment.aspect,
            flip=augment.flip,
            strength=augment.strength,
        )
    return source.resize
