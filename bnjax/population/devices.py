"""What runs on the devices: compiled once for a network, read by the host."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils


@functools.lru_cache(maxsize=16)
def compiled(
    function: Callable[..., Any], *known: Any, axis_name: str | None
) -> Callable[[Any, Any], Any]:
    """Return a compiled function of the network's variables and a batch.

    The same arguments give the same function, so that a network is compiled once and
    not each time that its statistics are estimated.

    Args:
        function: of `known`, the variables and a batch.
        *known: hashable.
        axis_name: that of pmap over the first axis of the batch, whose results are
            stacked; None for one program.
    """

    def run(variables: Any, batch: Any) -> Any:
        try:
            return function(*known, variables, batch)
        except NameError as error:
            error.add_note(
                "recompute_batch_stats: where it is an axis name that is not bound, "
                "give axis_name=... and batches with a first axis of devices, or map "
                "inside apply_fn."
            )
            raise

    if axis_name is None:
        return jax.jit(run)

    def on_each(variables: Any, batch: Any) -> Any:
        return lax.all_gather(run(variables, batch), axis_name)

    mapped = jax.pmap(on_each, axis_name=axis_name, in_axes=(None, 0), out_axes=None)

    def checked(variables: Any, batch: Any) -> Any:
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        count = jax.local_device_count()
        if len(sizes) != 1 or not sizes <= {(n,) for n in range(1, count + 1)}:
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
            raise ValueError(
                f"recompute_batch_stats: axis_name={axis_name!r} with a batch of "
                f"shapes {shapes}; expected a first axis of one entry for each device, "
                f"at most {count} here. Without shards of that kind leave axis_name "
                "out."
            )
        return mapped(variables, batch)

    return checked


def on_host(results: Iterable[Any]) -> Iterator[Any]:
    """Yield results as NumPy arrays, each once the next has been started."""
    started: list[Any] = []
    for result in results:
        started.append(result)
        if len(started) > 1:
            yield _as_numpy(started.pop(0))
    yield from map(_as_numpy, started)


def _as_numpy(tree: Any) -> Any:
    def read(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(read, tree)


def placed_like(value: np.ndarray, old: Any) -> jax.Array:
    """The value as an array of the dtype of `old`, on the devices that hold it."""
    value = value.astype(old.dtype)
    if getattr(old, "committed", False):
        return jax.device_put(value, old.sharding)
    return jnp.asarray(value)
