"""The resident path: the whole set on the device, each batch a row of indices.

Which examples make which batch is a pure function of the run's key, the step and the
sizes, so that a run taken up at any step meets the same batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Report = Callable[[int, int], None]


class Arrays(NamedTuple):
    """Examples of one split.

    Args:
        images: shape (examples, ...), as the source stores them (uint8).
        labels: shape (examples,), int32.
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


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
