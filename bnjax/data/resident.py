"""The resident path: the whole set on the device, each batch a row of indices.

Which examples make which batch is a pure function of the run's key, the step and the
sizes, so that a run taken up at any step meets the same batches.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Arrays(NamedTuple):
    """Examples of one split.

    Args:
        images: shape (examples, ...), as the source stores them (uint8).
        labels: shape (examples,), int32.
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


def to_inputs(images: jax.Array, max_value: int, *, binarize: bool) -> jax.Array:
    """Return pixels as float32 in [0, 1], or 0 and 1 alone.

    Args:
        images: integers from 0 to `max_value`, any shape.
        max_value: what becomes 1.
        binarize: give 1 above half of the range and 0 elsewhere.

    Example:
        >>> import numpy as np
        >>> pixels = np.array([0, 127, 128, 255], np.uint8)
        >>> to_inputs(pixels, 255, binarize=True).tolist()
        [0.0, 0.0, 1.0, 1.0]
        >>> to_inputs(np.array([0, 4, 16], np.uint8), 16, binarize=False).tolist()
        [0.0, 0.25, 1.0]
    """
    unit = jnp.asarray(images).astype(jnp.float32) / max_value
    return (unit > 0.5).astype(jnp.float32) if binarize else unit


def make_gather(
    max_value: int, *, binarize: bool
) -> Callable[[Arrays, jax.Array], dict[str, jax.Array]]:
    """Return `gather(arrays, rows) -> batch`, the inputs and labels of some rows."""

    def gather(arrays: Arrays, rows: jax.Array) -> dict[str, jax.Array]:
        images = jnp.asarray(arrays.images)[rows]
        return {
            "image": to_inputs(images, max_value, binarize=binarize),
            "label": jnp.asarray(arrays.labels)[rows],
        }

    return gather


@functools.partial(jax.jit, static_argnums=1)
def _permutation(key: jax.Array, examples: int) -> jax.Array:
    return jax.random.permutation(key, examples)


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
        self._batch_size = batch_size
        # Two: the rows of one dispatch may begin in one epoch and end in the next.
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.asarray(_permutation(epoch_key(epoch), examples), np.int32)
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
            start = place * self._batch_size
            batches.append(self._epoch(epoch)[start : start + self._batch_size])
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
