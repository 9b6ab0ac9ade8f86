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

# Host memory that the chunk of one dispatch may take.
CHUNK_BYTES = 2**26
# Nowhere near so many neighbours are damaged in a set that is fit for use.
REPLACEMENTS = 50


class Feed:
    """The batches of a run, in order."""

    constants: Any = ()
    """Arrays that every dispatch is given: the resident set, or nothing."""
    steps_per_epoch: int
    chunk_steps: int
    """The most steps that one chunk should hold."""

    def __init__(self, data: DataConfig, source: Source) -> None:
        self._data = data
        self._to_inputs = make_to_inputs(data, source.max_value)

    def chunk(self, step: int, steps: int) -> Any:
        """Return host arrays, (steps, local batch, ...), for the steps from `step`."""
        raise NotImplementedError

    def spec(self, steps: int) -> Any:
        """Return the shapes and dtypes of a chunk, drawing none."""
        raise NotImplementedError

    def batch(self, constants: Any, item: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Make one item of a chunk, or a device's part of it, a batch; it is pure.

        The constants are on the device. The key is the step's, the same everywhere.
        "image" is floating, of shape (batch, ...), and "label" of shape (batch,).
        """
        raise NotImplementedError

    def _to_batch(
        self, image: jax.Array, label: jax.Array, row: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        augment = self._data.augment
        if augment.kind == "shift":
            # An example's randomness is the same anywhere in the batch, on any device.
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
            image = shift_and_mirror(
                image, keys, padding=augment.padding, flip=augment.flip
            )
        return {"image": self._to_inputs(image), "label": label}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs beside the step, as JSON holds it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""

    def close(self) -> None:
        """Let go of files and worker processes."""


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

    An epoch has as many steps as there are whole batches and meets no example twice.
    The examples left over are others in every epoch, except with fixed batches. The key
    of an epoch's order is folded from `key`. Each of `shards` hosts has its part of a
    batch of `batch_size`: the parts, one after the other, are the batch.
    """
    check_images(data, source.image_shape)
    local = batch_size // shards
    # What the host draws follows from the key of epoch 0.
    words = np.asarray(jax.random.key_data(jax.random.fold_in(key, 0)))
    seed = tuple(words.tolist())
    size = source.sizes["train"] * math.prod(source.image_shape)
    fits = size <= data.resident_bytes and data.augment.kind != "crop"
    if data.path == "streaming" or (data.path == "auto" and not fits):
        # Batches of a host's size, every `shards`-th of them.
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
    """Makes pixels from 0 to `max_value` the network's inputs; see `DataConfig`."""

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


def make_to_inputs(data: DataConfig, max_value: int) -> ToInputs:
    """Return what makes stored pixels the network's inputs."""
    return ToInputs(max_value, binarize=data.binarize, mean=data.mean, std=data.std)


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


# --- Resident: the whole set on the device ------------------------------------------


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
    """
    order = np.arange(examples, dtype=np.int32)
    places = np.arange(examples, dtype=np.uint64)
    for drawn in _sort_keys(key, examples):
        # Equal keys stay in order: the place is the lower half of what is sorted.
        keys = np.asarray(drawn).astype(np.uint64) << np.uint64(32) | places
        keys.sort()
        order = order[(keys & np.uint64(2**32 - 1)).astype(np.intp)]
    return order


# Two epochs: a dispatch, or what workers read ahead, may end in the next.
@functools.lru_cache(maxsize=2)
def epoch_rows(
    data: DataConfig,
    examples: int,
    batch_size: int,
    seed: tuple[int, ...],
    epoch: int,
) -> np.ndarray:
    """Return the order of an epoch's examples, as `data.shuffle` has it.

    grain's own shuffle has one of the three modes, and takes up to a millisecond an
    example where there are a few hundred.

    Example:
        >>> data = DataConfig(shuffle="within-shard", shard_size=2)
        >>> epoch_rows(data, examples=6, batch_size=2, seed=(0,), epoch=0).tolist()
        [2, 3, 4, 5, 1, 0]

    References:
        Ioffe and Szegedy 2015, section 4.2.1 on shuffling: about 1 % of accuracy.
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
    """The whole set on the device; a chunk holds indices, `rows` those of an epoch."""

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
        # The first draw compiles; that is no part of a step.
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


# --- Streaming: read by grain as the run goes ---------------------------------------


def stream_batches(
    data: DataConfig,
    source: Source,
    batch_size: int,
    local: int,
    seed: tuple[int, ...],
) -> Any:
    """Return the training batches in pieces of `local` examples, a `grain.MapDataset`.

    Piece i is a function of i and the seed alone. What is drawn for an example depends
    on seed, epoch and example: not on its batch, the host or the worker.

    Pieces are read whole: `random_map` and `batch` of grain, an example at a time, take
    a tenth of the time that a small image does, and tfds reads batches twice as fast.
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
    """Read and augment some examples; the next one takes a damaged one's place.

    "row" is the example's number in the set, and "problems" what is wrong with damaged
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
    """Return an iterator of a `grain.MapDataset` that keeps `prefetch` items ready.

    So does each of `workers` processes; where there are none, threads of this one read.
    """
    import grain
    from absl import flags

    # grain asks absl for flags of its own, which no absl program has parsed here.
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


class StreamingFeed(Feed):
    """Batches read ahead by grain; a chunk holds images, the device converts them."""

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
        """Return the damaged rows met so far; the step says the rest."""
        return {"damaged": sorted(self._damage.rows)}

    def restore(self, state: dict[str, Any]) -> None:
        """Remember the damaged rows; the next chunk finds its own place."""
        self._damage.rows = dict.fromkeys(state["damaged"], "cannot be decoded")

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator, self._next = None, -1
