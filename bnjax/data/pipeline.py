"""Feeds of training batches: one interface for data on the device and for streaming.

On the host, a feed cuts the training set into chunks, one for each dispatch. On the
device, it makes a batch of each item of a chunk.
"""

import dataclasses
import functools
import math
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._validate import first_line
from bnjax.data.config import DataConfig, DataError, check_images
from bnjax.data.images import random_resized_crop, shift_and_mirror
from bnjax.data.records import Arrays, Damage, Records, check_label, check_shape
from bnjax.data.sources import Report, Source

# The host memory that the chunk of one dispatch may use.
CHUNK_BYTES = 2**26
# A usable data set never has this many damaged neighbors.
REPLACEMENTS = 50


class Feed:
    """The batches of a run, in order."""

    constants: Any = ()
    """Arrays that every dispatch gets, the resident set or nothing."""
    steps_per_epoch: int
    chunk_steps: int
    """The largest number of steps that one chunk should hold."""

    def __init__(self, data: DataConfig, source: Source) -> None:
        self._data = data
        self._to_inputs = make_to_inputs(data, source.max_value)

    def chunk(self, step: int, steps: int) -> Any:
        """Return host arrays, (steps, local batch, ...), for the steps from `step`."""
        raise NotImplementedError

    def spec(self, steps: int) -> Any:
        """Return the shapes and dtypes of a chunk, without drawing one."""
        raise NotImplementedError

    def batch(self, constants: Any, item: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Make a batch of one item of a chunk, or of a device's part; a pure function.

        The constants are on the device. The key is that of the step, equal on all
        devices. "image" is floating, of shape (batch, ...), and "label" has shape
        (batch,).
        """
        raise NotImplementedError

    def _to_batch(
        self, image: jax.Array, label: jax.Array, row: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        augment = self._data.augment
        if augment.kind == "shift":
            # The randomness of an example does not depend on its place or device.
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
            image = shift_and_mirror(
                image, keys, padding=augment.padding, flip=augment.flip
            )
        return {"image": self._to_inputs(image), "label": label}

    def state(self) -> dict[str, Any]:
        """Return the values that `restore` needs beside the step, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to the point of the call of `state`."""

    def close(self) -> None:
        """Close files and end worker processes."""


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
    """Return the feed of a run.

    An epoch has as many steps as there are whole batches, and uses no example twice.
    Each epoch leaves out other examples, except with fixed batches. The key of an
    epoch's order is folded from `key`. Each of `shards` hosts has a part of a batch of
    `batch_size`; the concatenated parts are the batch.

    Args:
        data: the settings.
        source: the data set.
        batch_size: the examples in a global batch.
        key: the key of the order and of the augmentation.
        shards: the number of hosts.
        shard: the index of this host.
        report: called with the examples read and their total.

    Returns:
        The feed.
    """
    check_images(data, source.image_shape)
    local = batch_size // shards
    # The random numbers of the host come from the key of epoch 0.
    words = np.asarray(jax.random.key_data(jax.random.fold_in(key, 0)))
    seed = tuple(words.tolist())
    size = source.sizes["train"] * math.prod(source.image_shape)
    fits = size <= data.resident_bytes and data.augment.kind != "crop"
    if data.path == "streaming" or (data.path == "auto" and not fits):
        # Every `shards`-th batch of this host's size.
        batches = stream_batches(data, source, batch_size, local, seed)
        steps = source.sizes["train"] // batch_size
        return StreamingFeed(data, source, batches[shard::shards], local, steps)
    arrays = source.load("train", report)
    examples = len(arrays.labels)

    # Two epochs: a chunk may end in the next.
    @functools.lru_cache(maxsize=2)
    def local_rows(epoch: int) -> np.ndarray:
        if data.shuffle == "global":
            rows = permutation(jax.random.fold_in(key, epoch), examples)
        else:
            rows = epoch_rows(data, examples, batch_size, seed, epoch)
        steps = examples // batch_size
        rows = rows[: steps * batch_size].astype(np.int32)
        return rows.reshape(steps, shards, local)[:, shard]

    return ResidentFeed(data, source, arrays, local_rows)


# --- On the device ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ToInputs:
    """Converts pixels from 0 to `max_value` to network inputs; see `DataConfig`."""

    max_value: int
    binarize: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Return a float32 array of the same shape."""
        unit = jnp.asarray(images).astype(jnp.float32) / self.max_value
        if self.binarize:
            unit = (unit > 0.5).astype(jnp.float32)
        if (self.mean, self.std) == ((0.0,), (1.0,)):
            return unit
        return (unit - jnp.array(self.mean)) / jnp.array(self.std)


def make_to_inputs(data: DataConfig, max_value: int) -> ToInputs:
    """Return the conversion of stored pixels to network inputs."""
    return ToInputs(max_value, binarize=data.binarize, mean=data.mean, std=data.std)


def make_gather(
    to_inputs: Callable[[jax.Array], jax.Array],
) -> Callable[[Arrays, jax.Array], dict[str, jax.Array]]:
    """Return `gather(arrays, rows)`, which makes a batch of these rows."""

    def gather(arrays: Arrays, rows: jax.Array) -> dict[str, jax.Array]:
        return {
            "image": to_inputs(jnp.asarray(arrays.images)[rows]),
            "label": jnp.asarray(arrays.labels)[rows],
        }

    return gather


# --- Resident: the whole set on the device ------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _sort_keys(key: jax.Array, examples: int) -> list[jax.Array]:
    """Return the sort keys of each round of `jax.random.permutation`."""
    largest = np.iinfo(np.uint32).max
    rounds = int(np.ceil(3 * np.log(max(examples, 1)) / np.log(largest)))
    keys = []
    for _ in range(rounds):
        key, drawn = jax.random.split(key)
        keys.append(jax.random.bits(drawn, (examples,), jnp.uint32))
    return keys


def permutation(key: jax.Array, examples: int) -> np.ndarray:
    """Return `jax.random.permutation(key, examples)`, sorted by NumPy.

    On a CPU, XLA's sort takes a tenth of the time of an epoch, and NumPy's sort a
    twentieth of XLA's time.
    """
    order = np.arange(examples, dtype=np.int32)
    places = np.arange(examples, dtype=np.uint64)
    for drawn in _sort_keys(key, examples):
        # Equal keys stay in order, because the index is the lower half of the sort key.
        keys = np.asarray(drawn).astype(np.uint64) << np.uint64(32) | places
        keys.sort()
        order = order[(keys & np.uint64(2**32 - 1)).astype(np.intp)]
    return order


# Two epochs: a dispatch, or the batches that workers read ahead, may end in the next.
@functools.lru_cache(maxsize=2)
def epoch_rows(
    data: DataConfig,
    examples: int,
    batch_size: int,
    seed: tuple[int, ...],
    epoch: int,
) -> np.ndarray:
    """Return the order of an epoch's examples, according to `data.shuffle`.

    grain's own shuffle has only one of the three modes, and takes up to a millisecond
    for each example of a set of a few hundred.

    Examples:
        >>> data = DataConfig(shuffle="within-shard", shard_size=2)
        >>> epoch_rows(data, examples=6, batch_size=2, seed=(0,), epoch=0).tolist()
        [2, 3, 4, 5, 1, 0]

    References:
        Ioffe & Szegedy (2015), section 4.2.1, on shuffling: about 1 % of accuracy.
    """
    rng = np.random.default_rng([*seed, 0, epoch])
    if data.shuffle == "global":
        return rng.permutation(examples)
    if data.shuffle == "within-shard":
        run = np.arange(examples) // data.shard_size
        rank = rng.permutation(run[-1] + 1)[run]
        return np.lexsort((rng.random(examples), rank))
    rows = np.random.default_rng([*seed, 1]).permutation(examples)
    kept = examples - examples % batch_size
    batches = rng.permutation(rows[:kept].reshape(-1, batch_size))
    return np.concatenate([batches.ravel(), rows[kept:]])


class ResidentFeed(Feed):
    """The whole set is on the device; a chunk holds indices.

    `rows` returns the indices of an epoch.
    """

    chunk_steps = 2**30

    def __init__(
        self,
        data: DataConfig,
        source: Source,
        arrays: Arrays,
        rows: Callable[[int], np.ndarray],
    ) -> None:
        super().__init__(data, source)
        self.constants, self._rows = arrays, rows
        # The first draw compiles; do this before the first step.
        self.steps_per_epoch, self._local = rows(0).shape

    def chunk(self, step: int, steps: int) -> np.ndarray:
        """Return indices."""
        places = (divmod(step + i, self.steps_per_epoch) for i in range(steps))
        return np.stack([self._rows(epoch)[place] for epoch, place in places])

    def spec(self, steps: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the indices."""
        return jax.ShapeDtypeStruct((steps, self._local), np.int32)

    def batch(
        self, constants: Arrays, item: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Gather the rows and convert them."""
        images, labels = (jnp.asarray(array)[item] for array in constants)
        return self._to_batch(images, labels, item, key)


# --- Streaming: grain reads examples during the run ---------------------------------


def stream_batches(
    data: DataConfig,
    source: Source,
    batch_size: int,
    local: int,
    seed: tuple[int, ...],
) -> Any:
    """Return a `grain.MapDataset` of training batches in pieces of `local` examples.

    Piece i depends only on i and the seed. The augmentation of an example depends on
    the seed, the epoch and the example, not on its batch, host or worker.

    A piece is read as a whole: grain's `random_map` and `batch` handle single examples
    and take a tenth of the time of a small image, and tfds reads batches twice as fast.
    """
    import grain

    examples = source.sizes["train"]
    pieces = examples // batch_size * (batch_size // local)

    def read(index: int, _: Any) -> dict[str, Any]:
        epoch, place = divmod(index, pieces)
        rows = epoch_rows(data, examples, batch_size, seed, epoch)
        rows = rows[place * local : (place + 1) * local]
        return _read_batch(data, source, rows, (*seed, 2, epoch))

    return grain.MapDataset.range(pieces).map_with_index(read).repeat()


def _read_batch(
    data: DataConfig, source: Source, rows: np.ndarray, seed: tuple[int, ...]
) -> dict[str, Any]:
    """Read and augment some examples; the next example replaces a damaged one.

    "row" is the index of the example in the set, and "problems" describes the damaged
    rows.
    """
    records = source.splits["train"]
    batch: dict[str, Any] = {
        "image": np.empty((len(rows), *source.image_shape), np.uint8),
        "label": np.empty(len(rows), np.int32),
        "row": rows.astype(np.int32),
        "problems": {},
    }
    for i, example in enumerate(records.read(rows.tolist())):
        row, (image, label, problem) = int(rows[i]), example
        if image is None:
            batch["problems"][row] = problem
            row, image, label = _replacement(records, row)
            batch["row"][i] = row
        where = records.where(row)
        check_label(label, source.classes, where)
        if data.augment.kind == "crop":
            rng, size = np.random.default_rng((*seed, row)), source.image_shape[0]
            image = random_resized_crop(image, rng, size, data.augment)
            check_shape(image, source.image_shape, where)
        else:
            image = source.fit(image, where)
        batch["image"][i], batch["label"][i] = image, label
    return batch


def _replacement(records: Records, damaged: int) -> tuple[int, np.ndarray, int]:
    for distance in range(1, REPLACEMENTS):
        row = (damaged + distance) % len(records)
        image, label, _ = records.read([row])[0]
        if image is not None:
            return row, image, label
    raise DataError(
        f"{records.where(damaged)} cannot be decoded, nor can the "
        f"{REPLACEMENTS - 1} images after it. Fetch the data set again."
    )


def read_ahead(dataset: Any, *, workers: int = 0, prefetch: int = 2) -> Any:
    """Return an iterator of a `grain.MapDataset` that reads `prefetch` items ahead.

    Each of `workers` processes reads that many items ahead. Without workers, threads of
    this process read them.
    """
    import grain
    from absl import flags

    # grain reads absl flags, which nothing has parsed here.
    flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else min(4, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    items = dataset.to_iter_dataset(options)
    if workers:
        processes = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=prefetch
        )
        items = items.mp_prefetch(processes, _start_worker)
    return iter(items)


def _start_worker(index: int, count: int) -> None:  # noqa: ARG001
    """Ignore Ctrl-C, use one core, and end when the run ends in any way."""
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


class StreamingFeed(Feed):
    """grain reads batches ahead; a chunk holds images, which the device converts."""

    def __init__(
        self, data: DataConfig, source: Source, batches: Any, local: int, steps: int
    ) -> None:
        super().__init__(data, source)
        self.steps_per_epoch, self._batches = steps, batches
        self._shape = (local, *source.image_shape)
        self.chunk_steps = max(1, CHUNK_BYTES // math.prod(self._shape))
        self._damage = Damage(source.splits["train"])
        self._iterator: Any = None
        self._next = -1

    def chunk(self, step: int, steps: int) -> dict[str, np.ndarray]:
        """Return images, labels and rows."""
        if step != self._next:
            self.close()
            options = {"workers": self._data.workers, "prefetch": self._data.prefetch}
            self._iterator = read_ahead(self._batches[step:], **options)
        batches = []
        for _ in range(steps):
            try:
                batches.append(next(self._iterator))
            except DataError:
                raise
            except RuntimeError as error:
                raise DataError(
                    f"reading the data failed: {first_line(error)} If memory ran out, "
                    "give fewer --data.workers or a smaller --data.prefetch."
                ) from error
            self._damage.add(batches[-1].pop("problems"))
        self._next = step + steps
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def spec(self, steps: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a chunk."""
        number = jax.ShapeDtypeStruct((steps, self._shape[0]), np.int32)
        images = jax.ShapeDtypeStruct((steps, *self._shape), np.uint8)
        return {"image": images, "label": number, "row": number}

    def batch(
        self, constants: Any, item: dict[str, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        """Convert the images."""
        del constants
        return self._to_batch(**item, key=key)

    def state(self) -> dict[str, Any]:
        """Return the damaged rows found so far; the step determines the rest."""
        return {"damaged": sorted(self._damage.rows)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the damaged rows; the next chunk starts at its own step."""
        self._damage.rows = dict.fromkeys(state["damaged"], "cannot be decoded")

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator, self._next = None, -1
