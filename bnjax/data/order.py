"""Which examples meet in which batch, without JAX: what worker processes compute.

An order is a pure function of its words of seed and the step, so that a run taken up
at any step, with any number of workers or hosts, meets the same batches.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

Shuffle = Literal["global", "within-shard", "fixed-batches"]


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
