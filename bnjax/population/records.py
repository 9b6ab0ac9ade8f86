"""What a layer notes about its input while a batch goes through the network."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax

from bnjax import _validate, functional
from bnjax.functional import Moments
from bnjax.linen import BatchNorm as LinenBatchNorm
from bnjax.nnx import BatchNorm as NnxBatchNorm

NAME = "population_record"

Path = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """Moments of all that a layer was given in one batch.

    It travels among the layer's own statistics, so that every transform that carries
    those (scan, vmap, remat, jit, pmap) carries it too.

    Attributes:
        moments: of the inputs of all calls, over the devices that share statistics.
        weight: the share of `moments.count` that this device stands for.
    """

    moments: Moments
    weight: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Record":
        """A record of no values, of the shape of the layer's statistics."""
        # NumPy's: it may go beside arrays on any devices.
        zeros: Any = np.zeros(shape, jnp.result_type(float))
        return cls(Moments(zeros, zeros, zeros), zeros)

    def joined(self, layer: Any, name: str, x: jax.Array, mask: Any) -> "Record":
        """This record and one more input.

        Args:
            layer: the batch norm layer, of linen or of nnx.
            name: what to call it in errors.
            x: what it was given.
            mask: likewise, or None.
        """
        with _validate.naming(name):
            found = _moments(layer, x, mask)
        shape = self.weight.shape
        if found.mean.size != math.prod(shape):
            raise ValueError(
                f"{name}: its statistics in `variables` have shape {shape}, its input "
                f"{jnp.shape(x)} has statistics of shape {found.mean.shape}; expected "
                "the same. Pass the variables that belong to this network."
            )
        devices = 1
        if layer.axis_name is not None:
            devices = lax.psum(
                1, layer.axis_name, axis_index_groups=layer.axis_index_groups
            )
        dtype = self.weight.dtype
        found = jax.tree.map(lambda leaf: leaf.reshape(shape).astype(dtype), found)
        old = jax.tree.map(jnp.asarray, self)
        return Record(old.moments.merge(found), old.weight + found.count / devices)


def is_training(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of a batch norm layer normalizes by the batch."""
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return not (layer.use_running_average if given is None else given)


def layer_name(path: Path) -> str:
    """A layer's path in the network as one string.

    Example:
        >>> layer_name(("block", "bn_0")), layer_name(())
        ('block/bn_0', '(top level)')
    """
    return "/".join(map(str, path)) or "(top level)"


def _moments(layer: Any, x: Any, mask: Any) -> Moments:
    """Moments about the mean: half a digit better than those of one pass."""
    x = _validate.as_input(x)
    x = x.astype(_validate.promoted(x.dtype, jnp.float32))
    options = {
        "axis": layer.axis,
        "mask": _as_moments_mask(layer, mask, x.shape),
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
    }
    found = functional.moments(x, **options)
    _, reduced = _validate.split_axes(x.shape, layer.axis)
    distance = x - jnp.expand_dims(found.mean, reduced)
    rest = functional.moments(distance, **options).mean
    second = functional.moments(jnp.square(distance), **options).mean
    var = jnp.maximum(second - jnp.square(rest), 0)
    return Moments(found.mean + rest, var, found.count)


def _as_moments_mask(layer: Any, mask: Any, shape: tuple[int, ...]) -> Any:
    if mask is None:
        return None
    ours = LinenBatchNorm if isinstance(layer, linen.Module) else NnxBatchNorm
    if isinstance(layer, ours):
        return _validate.broadcast_mask(mask, shape)
    # Flax takes every number but 0 for True, and NumPy's rule of shapes.
    return jnp.broadcast_to(jnp.asarray(mask, bool), shape)
