"""The streaming path: examples read, decoded and augmented as the run goes.

grain reads ahead, in threads or in worker processes; what a step takes is a function of
the order and the step alone, so that any step can be the next.
"""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bnjax.data.augment import HostTransform
from bnjax.data.order import HostOrder
from bnjax.data.records import (
    Records,
    check_damaged,
    check_label,
    check_shape,
    note_damaged,
)
from bnjax.training.errors import UserError, first_line

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
        raise UserError(
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
            UserError: examples cannot be read, too many images are damaged, or a
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
        except UserError:
            raise
        except RuntimeError as error:
            raise UserError(
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
