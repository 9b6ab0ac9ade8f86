"""What feeds the steps of a run: one interface, whether the data fit the device or not.

A feed cuts the training set into the chunks that one dispatch takes, on the host, and
makes a batch of each item of a chunk, on the device.
"""

import dataclasses
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._validate import first_line
from bnjax.data.augment import (
    HostTransform,
    RandomResizedCrop,
    resized,
    shift_and_mirror,
)
from bnjax.data.config import DataConfig, DataError, SettingError, Shuffle, check_images
from bnjax.data.sources import (
    Arrays,
    Records,
    Report,
    Source,
    check_damaged,
    check_label,
    check_shape,
    note_damaged,
)


@dataclasses.dataclass(frozen=True)
class HostOrder:
    """The order of the training examples in every epoch.

    An epoch has `examples // batch_size` steps and meets no example twice. The
    examples left over are others in every epoch, except with fixed batches.

    - "global": every epoch draws a permutation of all examples.
    - "within-shard": the set is cut into runs of `shard_size` examples as they are
      stored; every epoch shuffles the runs, and the examples inside each. Examples
      far apart rarely meet.
    - "fixed-batches": batches are drawn once, and every epoch shuffles the batches:
      the same examples are always normalized together.

    Args:
        words: of the run's seed.
        examples: how many there are.
        batch_size: how many a step takes; at most `examples`.
        shuffle: how thoroughly.
        shard_size: of "within-shard".

    Example:
        >>> order = HostOrder((0, 1), examples=6, batch_size=2)
        >>> sorted(order.rows(0, 3).ravel().tolist())
        [0, 1, 2, 3, 4, 5]
        >>> fixed = HostOrder((0, 1), 6, 2, shuffle="fixed-batches")
        >>> epochs = [
        ...     {frozenset(b) for b in fixed.rows(3 * e, 3).tolist()} for e in (0, 7)
        ... ]
        >>> epochs[0] == epochs[1]
        True

    References:
        Ioffe and Szegedy 2015, section 4.2.1 on shuffling: about 1 % of accuracy.
    """

    words: tuple[int, ...]
    examples: int
    batch_size: int
    shuffle: Shuffle = "global"
    shard_size: int = 1000

    @property
    def steps_per_epoch(self) -> int:
        """Return how many whole batches an epoch has."""
        return self.examples // self.batch_size

    def rows(self, first: int, steps: int) -> np.ndarray:
        """Return the indices of `steps` steps from step `first`.

        Args:
            first: steps already taken.
            steps: how many follow.

        Returns:
            int32 of shape (steps, batch_size).
        """
        places = (divmod(s, self.steps_per_epoch) for s in range(first, first + steps))
        return np.stack([_epoch(self, epoch)[place] for epoch, place in places])


# Two: a dispatch, or what workers read ahead, may end in the next epoch.
@functools.lru_cache(maxsize=2)
def _epoch(order: HostOrder, epoch: int) -> np.ndarray:
    """Return the indices of an epoch, int32 of shape (steps, batch_size)."""
    kept = order.steps_per_epoch * order.batch_size
    rng = np.random.default_rng([*order.words, 0, epoch])
    if order.shuffle == "fixed-batches":
        composition = np.random.default_rng([*order.words, 1])
        batches = composition.permutation(order.examples)[:kept]
        batches = batches.reshape(-1, order.batch_size)
        return rng.permutation(batches).astype(np.int32)
    if order.shuffle == "within-shard":
        places = np.arange(order.examples) // order.shard_size
        rank = rng.permutation(places[-1] + 1)[places]
        rows = np.lexsort((rng.random(order.examples), rank))
    else:
        rows = rng.permutation(order.examples)
    return rows[:kept].reshape(-1, order.batch_size).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ToInputs:
    """Makes stored pixels the numbers that the network is given.

    Args:
        max_value: what becomes 1; 0 becomes 0.
        binarize: give 1 above half of the range and 0 elsewhere.
        mean: subtracted after that, one number or one a channel.
        std: what is then divided by, one number or one a channel.

    Example:
        >>> import numpy as np
        >>> pixels = np.array([0, 127, 128, 255], np.uint8)
        >>> ToInputs(255, binarize=True)(pixels).tolist()
        [0.0, 0.0, 1.0, 1.0]
        >>> ToInputs(16)(np.array([0, 4, 16], np.uint8)).tolist()
        [0.0, 0.25, 1.0]
        >>> ToInputs(16, mean=(0.5,), std=(0.25,))(np.array([0, 8, 16])).tolist()
        [-2.0, 0.0, 2.0]
    """

    max_value: int
    binarize: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Return float32 of the same shape."""
        unit = jnp.asarray(images).astype(jnp.float32) / self.max_value
        if self.binarize:
            unit = (unit > 0.5).astype(jnp.float32)
        if (self.mean, self.std) == ((0.0,), (1.0,)):
            return unit
        return (unit - jnp.array(self.mean)) / jnp.array(self.std)


def make_gather(
    to_inputs: Callable[[jax.Array], jax.Array],
) -> Callable[[Arrays, jax.Array], dict[str, jax.Array]]:
    """Return `gather(arrays, rows) -> batch`, the inputs and labels of some rows."""

    def gather(arrays: Arrays, rows: jax.Array) -> dict[str, jax.Array]:
        return {
            "image": to_inputs(jnp.asarray(arrays.images)[rows]),
            "label": jnp.asarray(arrays.labels)[rows],
        }

    return gather


@functools.partial(jax.jit, static_argnums=1)
def _sort_keys(key: jax.Array, examples: int) -> list[jax.Array]:
    """Return what `jax.random.permutation` sorts by, round after round."""
    largest = np.iinfo(np.uint32).max
    rounds = int(np.ceil(3 * np.log(max(examples, 1)) / np.log(largest)))
    keys = []
    for _ in range(rounds):
        key, drawn = jax.random.split(key)
        keys.append(jax.random.bits(drawn, (examples,), jnp.uint32))
    return keys


def permutation(key: jax.Array, examples: int) -> np.ndarray:
    """Return `jax.random.permutation(key, examples)`, sorted by NumPy.

    XLA's sort takes a tenth of an epoch's time on a CPU, NumPy's a twentieth of that.

    Example:
        >>> permutation(jax.random.key(0), 5).tolist()
        [0, 1, 4, 3, 2]
        >>> jax.random.permutation(jax.random.key(0), 5).tolist()
        [0, 1, 4, 3, 2]
    """
    order = np.arange(examples, dtype=np.int32)
    places = np.arange(examples, dtype=np.uint64)
    for drawn in _sort_keys(key, examples):
        # Equal keys stay in order: the place is the lower half of what is sorted.
        keys = np.asarray(drawn).astype(np.uint64) << np.uint64(32) | places
        keys.sort()
        order = order[(keys & np.uint64(2**32 - 1)).astype(np.intp)]
    return order


class EpochOrder:
    """The order of the training examples, drawn anew for every epoch.

    An epoch has `examples // batch_size` steps; the few examples left over are others
    in every epoch.

    Args:
        epoch_key: gives the random key of an epoch, counted from 0.
        examples: how many there are.
        batch_size: how many a step takes; at most `examples`.

    Example:
        >>> import jax
        >>> order = EpochOrder(lambda e: jax.random.key(e), examples=6, batch_size=2)
        >>> sorted(order.rows(0, 3).ravel().tolist())
        [0, 1, 2, 3, 4, 5]
        >>> order.rows(2, 2).shape
        (2, 2)
    """

    def __init__(
        self, epoch_key: Callable[[int], jax.Array], examples: int, batch_size: int
    ) -> None:
        self.steps_per_epoch = examples // batch_size
        self.batch_size = batch_size
        # Two: the rows of one dispatch may begin in one epoch and end in the next.
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: permutation(epoch_key(epoch), examples)
        )

    def rows(self, first: int, steps: int) -> np.ndarray:
        """Return the indices of `steps` steps from step `first`.

        Args:
            first: steps already taken.
            steps: how many follow.

        Returns:
            int32 of shape (steps, batch_size).
        """
        batches = []
        for step in range(first, first + steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            start = place * self.batch_size
            batches.append(self._epoch(epoch)[start : start + self.batch_size])
        return np.stack(batches)


def padded_rows(examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices that meet every example once, the last batch padded.

    Args:
        examples: how many there are.
        batch_size: how many a batch holds.

    Returns:
        Indices, int32, and a mask, boolean, both of shape (batches, batch_size). The
        mask is False where an index only fills up.

    Example:
        >>> rows, mask = padded_rows(5, 3)
        >>> rows.tolist()
        [[0, 1, 2], [3, 4, 0]]
        >>> mask.tolist()
        [[True, True, True], [True, True, False]]
    """
    batches = -(-examples // batch_size)
    places = np.arange(batches * batch_size, dtype=np.int32)
    mask = places < examples
    rows = np.where(mask, places, 0)
    return rows.reshape(batches, batch_size), mask.reshape(batches, batch_size)


# A random-access source has a length; no run has so many steps.
ENDLESS = 2**40
# Host memory that the chunk of one dispatch may take.
CHUNK_BYTES = 2**26
# Nowhere near so many neighbours are damaged in a set that is fit for use.
REPLACEMENTS = 50


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """The batches of one host, by step: what grain reads from.

    A damaged image's place is taken by the example stored after it.

    Args:
        records: the training set.
        order: which examples each step takes.
        transform: makes a stored image one of `image_shape`; None where it is.
        classes: how many labels there are.
        image_shape: of one image in a batch.
        shards: how many hosts share a batch.
        shard: which of them this is.
    """

    records: Records
    order: HostOrder
    transform: HostTransform | None
    classes: int
    image_shape: tuple[int, ...]
    shards: int = 1
    shard: int = 0

    def __len__(self) -> int:
        """Return more steps than any run has."""
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return what step `index` takes, counted from 0.

        Returns:
            "image", uint8 of shape (local batch, ...); "label" and "row", the
            example's number in the set, int32; "damaged", the row that could not be
            decoded, or -1.
        """
        local = self.order.batch_size // self.shards
        place = self.shard * local
        rows = self.order.rows(index, 1)[0, place : place + local]
        epoch = index // self.order.steps_per_epoch
        batch = {
            "image": np.empty((local, *self.image_shape), np.uint8),
            "label": np.empty(local, np.int32),
            "row": rows.copy(),
            "damaged": np.full(local, -1, np.int32),
        }
        for i, example in enumerate(self.records.read(rows.tolist())):
            row = int(rows[i])
            image, label = example
            if image is None:
                batch["damaged"][i] = row
                row, image, label = self._replacement(row)
                batch["row"][i] = row
            check_label(label, self.classes, self.records.where(row))
            if self.transform is not None:
                words = (*self.order.words, 2, epoch, row)
                image = self.transform(image, np.random.default_rng(words))
            check_shape(image, self.image_shape, self.records.where(row))
            batch["image"][i], batch["label"][i] = image, label
        return batch

    def _replacement(self, damaged: int) -> tuple[int, np.ndarray, int]:
        for distance in range(1, REPLACEMENTS):
            row = (damaged + distance) % len(self.records)
            image, label = self.records.read([row])[0]
            if image is not None:
                return row, image, label
        raise DataError(
            f"{self.records.where(damaged)} cannot be decoded, nor can the "
            f"{REPLACEMENTS - 1} images after it. Fetch the data set again."
        )


class StreamingFeed:
    """Batches read ahead by grain; a chunk holds images, the device converts them.

    Args:
        batches: what each step takes.
        to_batch: makes a batch of an item and the step's key, on the device.
        workers: processes that read; 0 for threads of this one.
        prefetch: batches that each of them keeps ready.
    """

    def __init__(
        self,
        batches: HostBatches,
        to_batch: Callable[[Any, jax.Array], dict[str, jax.Array]],
        *,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        self.constants = ()
        self.steps_per_epoch = batches.order.steps_per_epoch
        self._local = batches.order.batch_size // batches.shards
        size = self._local * int(np.prod(batches.image_shape))
        self.chunk_steps = max(1, CHUNK_BYTES // size)
        self._batches = batches
        self._to_batch = to_batch
        self._workers = workers
        self._prefetch = prefetch
        self._iterator: Any = None
        self._next = -1
        self._damaged: set[int] = set()

    def chunk(self, step: int, steps: int) -> dict[str, np.ndarray]:
        """Return images, labels and rows, of shape (steps, local batch, ...).

        Raises:
            DataError: examples cannot be read, too many images are damaged, or a
                worker process died.
        """
        if step != self._next:
            self._seek(step)
        batches = [self._draw() for _ in range(steps)]
        self._next = step + steps
        names = ("image", "label", "row")
        return {name: np.stack([b[name] for b in batches]) for name in names}

    def spec(self, steps: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a chunk."""
        shape = (steps, self._local)
        number = jax.ShapeDtypeStruct(shape, np.int32)
        images = jax.ShapeDtypeStruct((*shape, *self._batches.image_shape), np.uint8)
        return {"image": images, "label": number, "row": number}

    def batch(
        self,
        constants: Any,  # noqa: ARG002
        item: dict[str, jax.Array],
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """Convert the images."""
        return self._to_batch(item, key)

    def state(self) -> dict[str, Any]:
        """Return the damaged rows met so far; the step says the rest."""
        return {"damaged": sorted(self._damaged)}

    def restore(self, state: dict[str, Any]) -> None:
        """Remember the damaged rows; the next chunk finds its own place."""
        self._damaged = set(state["damaged"])

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None
        self._next = -1

    def _seek(self, step: int) -> None:
        self.close()
        self._iterator = read_ahead(
            self._batches, step, workers=self._workers, prefetch=self._prefetch
        )
        self._next = step

    def _draw(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except DataError:
            raise
        except RuntimeError as error:
            raise DataError(
                f"reading the data failed: {first_line(error)} If memory ran out, give "
                "fewer --data.workers or a smaller --data.prefetch."
            ) from error
        damaged = {int(row) for row in batch["damaged"] if row >= 0} - self._damaged
        if damaged:
            self._damaged |= damaged
            check_damaged(sorted(self._damaged), self._batches.records)
            note_damaged(damaged, self._batches.records)
        return batch


def read_ahead(source: Any, first: int, *, workers: int, prefetch: int) -> Any:
    """Return grain's iterator of a random-access source from item `first`.

    Args:
        source: has a length and items by number.
        first: where to start.
        workers: processes that read; 0 for threads of this one.
        prefetch: items that each of them keeps ready.
    """
    import grain
    from absl import flags

    # grain asks absl for flags of its own, which no absl program has parsed here.
    flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else min(4, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.source(source)[first:].to_iter_dataset(options)
    if not workers:
        return iter(dataset)
    processes = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=prefetch
    )
    return iter(dataset.mp_prefetch(processes, _start_worker))


def _start_worker(index: int, count: int) -> None:  # noqa: ARG001
    """Leave Ctrl-C and one core a worker; end when the run does, however it ends."""
    import multiprocessing

    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    data: DataConfig,
    source: Source,
    *,
    batch_size: int,
    key: jax.Array,
    shards: int = 1,
    shard: int = 0,
    report: Report = lambda done, total: None,  # noqa: ARG005
) -> Feed:
    """Return what feeds the steps of a run.

    Args:
        data: how the set is read.
        source: the data set.
        batch_size: examples in a step, of all hosts together.
        key: of the order of the examples; that of an epoch is folded from it.
        shards: how many hosts share a batch.
        shard: which of them this is, counted from 0.
        report: called with examples read and their total, where that takes a while.

    Returns:
        A feed whose chunks hold this host's part of each batch.

    Raises:
        DataError: the settings do not fit the data, or these cannot be read.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> feed = make_feed(
        ...     DataConfig(),
        ...     open_source("digits"),
        ...     batch_size=100,
        ...     key=jax.random.key(0),
        ... )
        >>> feed.chunk(0, 3).shape, feed.steps_per_epoch
        ((3, 100), 14)
        >>> batch = feed.batch(feed.constants, feed.chunk(0, 1)[0], jax.random.key(0))
        >>> batch["image"].shape, batch["label"].shape
        ((100, 8, 8), (100,))
    """
    check_images(data, source.image_shape)

    def epoch_key(epoch: int) -> jax.Array:
        return jax.random.fold_in(key, epoch)

    words = tuple(int(word) for word in np.asarray(jax.random.key_data(epoch_key(0))))
    to_batch = make_to_batch(data, make_to_inputs(data, source.max_value))
    if choose_path(data, source) == "streaming":
        order = HostOrder(
            words,
            source.sizes["train"],
            batch_size,
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
        order = EpochOrder(epoch_key, examples, batch_size)
    else:
        order = HostOrder(
            words,
            examples,
            batch_size,
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


BLOCK_BYTES = 2**26


class Block(NamedTuple):
    """Some examples, and which of them count: not damaged, not there to fill up."""

    arrays: Arrays
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class SplitBlocks:
    """The test set in blocks of one size, decoded anew each time they are gone through.

    Args:
        source: the data set.
        size: examples in a block; the last is filled up.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> blocks = SplitBlocks(open_source("digits"), size=100)
        >>> [int(block.kept.sum()) for block in blocks]
        [100, 100, 100, 55]
    """

    source: Source
    size: int

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return math.ceil(self.source.sizes["test"] / self.size)

    def __getitem__(self, index: int) -> Block:
        """Read one block.

        Raises:
            DataError: an example has another shape or a wrong label.
        """
        source, records = self.source, self.source.splits["test"]
        images = np.zeros((self.size, *source.image_shape), np.uint8)
        labels = np.zeros(self.size, np.int32)
        kept = np.zeros(self.size, bool)
        for row, (stored, label) in self.examples(index):
            image = source.resize(stored) if source.resize else stored
            check_shape(image, source.image_shape, records.where(row))
            place = row - index * self.size
            images[place], labels[place], kept[place] = image, label, True
        return Block(Arrays(images, labels), kept)

    def __iter__(self) -> Iterator[Block]:
        """Go through all blocks, reading ahead.

        Raises:
            DataError: too many images are damaged, or one cannot be used.
        """
        return self.read(self)

    def examples(self, index: int) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
        """Read the examples of one block as they are stored, but for damaged ones.

        Returns:
            The row of each, and its image and label.

        Raises:
            DataError: an example has a wrong label.
        """
        records, rows = self.source.splits["test"], self.rows(index)
        for row, (image, label) in zip(rows, records.read(rows), strict=True):
            if image is not None:
                check_label(label, self.source.classes, records.where(row))
                yield row, (image, label)

    def read(self, made: Any) -> Iterator[Any]:
        """Go through what is made of each block, reading ahead.

        Args:
            made: as many items as there are blocks, each with a mask `kept`.

        Raises:
            DataError: too many images are damaged, or one cannot be used.
        """
        records = self.source.splits["test"]
        damaged: list[int] = []
        items = read_ahead(made, 0, workers=0, prefetch=2)
        for index in range(len(self)):
            item = next(items)
            rows = self.rows(index)
            damaged += [row for row in rows if not item.kept[row - rows.start]]
            check_damaged(damaged, records)
            yield item

    def rows(self, index: int) -> range:
        """Return which examples a block holds."""
        stop = min((index + 1) * self.size, self.source.sizes["test"])
        return range(index * self.size, stop)


def load_test(data: DataConfig, source: Source, report: Report) -> Arrays | SplitBlocks:
    """Return the test set: in memory up to `data.resident_bytes`, else in blocks."""
    size = math.prod(source.image_shape)
    if source.sizes["test"] * size <= data.resident_bytes:
        return source.load("test", report)
    return SplitBlocks(source, max(1, min(BLOCK_BYTES, data.resident_bytes) // size))


CROPS = (1, 10, 144)
# The shorter side that an image is scaled to, for a network of 224 pixels.
_SIDES = {10: (256,), 144: (256, 288, 320, 352)}
_FOR_SIZE = 224


def scaled_sizes(
    height: int, width: int, size: int, crops: int
) -> list[tuple[int, int]]:
    """Return the heights and widths that an image is scaled to.

    The shorter side becomes 256 for 10 crops, and 256, 288, 320 and 352 for 144, where
    the network is given 224 pixels; for another size, in proportion and rounded.

    Args:
        height: of the stored image.
        width: of the stored image.
        size: height and width that the network is given.
        crops: 10 or 144.

    Example:
        >>> scaled_sizes(500, 400, 224, 144)
        [(320, 256), (360, 288), (400, 320), (440, 352)]
        >>> scaled_sizes(32, 32, 32, 144)
        [(37, 37), (41, 41), (46, 46), (50, 50)]
    """
    sides = [round(side * size / _FOR_SIZE) for side in _SIDES[crops]]
    shorter = min(height, width)
    return [
        (round(height * side / shorter), round(width * side / shorter))
        for side in sides
    ]


def boxes(height: int, width: int, size: int, crops: int) -> np.ndarray:
    """Return the crops of one image, as places in the image scaled.

    10 crops: of the central square, the four corners and the centre, and each of them
    mirrored. 144 crops: at each of four scales, the left, the central and the right
    square (of an upright image the top, the central and the bottom one); of each
    square, the four corners, the centre and all of it, made smaller; and each of them
    mirrored. The three squares of a square image are one and the same: its crops are
    there three times.

    Args:
        height: of the stored image.
        width: of the stored image.
        size: height and width that the network is given.
        crops: 10 or 144.

    Returns:
        int32, shape (crops, 6): the scale's number in `scaled_sizes`, top, left,
        height and width in pixels of that scale, and 1 for a crop to be mirrored.

    Example:
        >>> boxes(300, 200, 224, 10)[:3].tolist()
        [[0, 64, 0, 224, 224, 0], [0, 64, 0, 224, 224, 1], [0, 64, 32, 224, 224, 0]]

    References:
        Szegedy et al. 2015 (GoogLeNet), section 7, for the 144; Krizhevsky et al. 2012,
        section 4.1, for the 10.
    """
    found = []
    for scale, (tall, wide) in enumerate(scaled_sizes(height, width, size, crops)):
        side = min(tall, wide)
        free_y, free_x = tall - side, wide - side
        squares = [(free_y // 2, free_x // 2)]
        if crops == 144:
            squares = [(0, 0), *squares, (free_y, free_x)]
        free = side - size
        parts = [(y, x, size) for y in (0, free) for x in (0, free)]
        parts.append((free // 2, free // 2, size))
        if crops == 144:
            parts.append((0, 0, side))
        found += [
            (scale, top + y, left + x, length, length, mirrored)
            for top, left in squares
            for y, x, length in parts
            for mirrored in (0, 1)
        ]
    return np.array(found, np.int32)


def cut(image: np.ndarray, size: int, crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the crops of one image out, equal ones once.

    Args:
        image: uint8, shape (height, width) or (height, width, channels).
        size: height and width of each crop.
        crops: 10 or 144.

    Returns:
        The different crops, uint8 of shape (different, size, size, ...), and how many
        times each of them counts, int64 of shape (different,); those add up to `crops`.

    Example:
        >>> images, counts = cut(np.zeros((40, 40, 3), np.uint8), 32, 144)
        >>> images.shape, counts.tolist() == [3] * 48
        ((48, 32, 32, 3), True)
    """
    height, width = image.shape[:2]
    scaled = [
        resized(image, *shape) for shape in scaled_sizes(height, width, size, crops)
    ]
    different, counts = np.unique(
        boxes(height, width, size, crops), axis=0, return_counts=True
    )
    images = np.empty((len(different), size, size, *image.shape[2:]), np.uint8)
    for place, (scale, y, x, tall, wide, mirrored) in enumerate(different.tolist()):
        part = scaled[scale][y : y + tall, x : x + wide]
        if tall != size:
            part = resized(part, size, size)
        images[place] = part[:, ::-1] if mirrored else part
    return images, counts


class CropBlock(NamedTuple):
    """The crops of some examples.

    Args:
        images: uint8, shape (images, ...): those of one example follow each other.
        places: which example of the block each is of, shape (images,).
        counts: how many crops each stands for, shape (images,).
        labels: of the examples, shape (examples,).
        kept: which examples there are: not damaged, not there to fill up.
    """

    images: np.ndarray
    places: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class CropBlocks:
    """The crops of the test set in blocks, made anew each time they are gone through.

    Args:
        split: the test set; the crops of one of its blocks are in memory together.
        crops: of each image: 1, as the run itself evaluates, 10 or 144.

    Example:
        >>> from bnjax.data.sources import open_source
        >>> source = open_source("synthetic:16x16x3:5:30")
        >>> blocks = CropBlocks(SplitBlocks(source, size=20), crops=10)
        >>> [block.images.shape for block in blocks]
        [(200, 16, 16, 3), (100, 16, 16, 3)]
    """

    split: SplitBlocks
    crops: int

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return len(self.split)

    def __getitem__(self, index: int) -> CropBlock:
        """Read one block.

        Raises:
            DataError: an example has another shape or a wrong label.
        """
        source = self.split.source
        images, places, counts = [], [], []
        labels = np.zeros(self.split.size, np.int32)
        kept = np.zeros(self.split.size, bool)
        for row, (image, label) in self.split.examples(index):
            place = row - index * self.split.size
            labels[place], kept[place] = label, True
            found, times = self._cut(image, source.splits["test"].where(row))
            images.append(found)
            counts.append(times)
            places.append(np.full(len(times), place))
        # First nothing: all of a block may be damaged.
        none = np.zeros(0, np.int64)
        return CropBlock(
            np.concatenate([np.zeros((0, *source.image_shape), np.uint8), *images]),
            np.concatenate([none, *places]),
            np.concatenate([none, *counts]),
            labels,
            kept,
        )

    def __iter__(self) -> Iterator[CropBlock]:
        """Go through all blocks, reading ahead; name damaged images at the end.

        Raises:
            DataError: too many images are damaged, or one cannot be used.
        """
        damaged = []
        for index, block in enumerate(self.split.read(self)):
            rows = self.split.rows(index)
            damaged += [row for row in rows if not block.kept[row - rows.start]]
            yield block
        note_damaged(damaged, self.split.source.splits["test"])

    def _cut(self, image: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
        source = self.split.source
        if source.resize is None:
            check_shape(image, source.image_shape, where)
        if self.crops == 1:
            one = source.resize(image) if source.resize else image
            return one[None], np.ones(1, np.int64)
        images, counts = cut(image, source.image_shape[0], self.crops)
        # A cubic goes beyond the values it is given.
        return np.minimum(images, np.uint8(source.max_value)), counts


def crop_blocks(source: Source, crops: int) -> CropBlocks:
    """Return the crops of a test set, in blocks of a bounded size.

    Raises:
        DataError: `crops` is none of `CROPS`, or the network is not given squares.
    """
    if crops not in CROPS:
        raise SettingError(f"--crops {crops}: expected 1, 10 or 144.")
    height, width = source.image_shape[:2]
    if crops > 1 and height != width:
        raise SettingError(
            f"--crops {crops}: the crops are squares, and the network takes images of "
            f"{height}x{width}. Give --crops 1.",
        )
    size = crops * math.prod(source.image_shape)
    return CropBlocks(SplitBlocks(source, max(1, BLOCK_BYTES // size)), crops)
