"""The batch norm layers of a flax.linen network, and what a batch tells about them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.population.devices import compiled
from bnjax.population.records import NAME, Path, Record, is_training, layer_name

COLLECTION = "batch_stats"
EXAMPLE = (
    "lambda variables, batch: model.apply(variables, batch, train=True, "
    "mutable=['batch_stats'])"
)
TRAINING = (
    f"expected the call of a training step, such as {EXAMPLE}, in which the layers "
    "have use_running_average=False"
)


@dataclasses.dataclass(frozen=True)
class LinenLayers:
    """The layers of a network of flax.linen.

    Args:
        variables: of the network, "batch_stats" among them.
    """

    variables: Mapping[str, Any]
    training: ClassVar[str] = TRAINING

    def shapes(self) -> dict[Path, tuple[int, ...]]:
        """The shape of the statistics of each layer that has a mean and a variance."""
        flat = self._flat()
        return {
            path[:-1]: jnp.shape(leaf)
            for path, leaf in flat.items()
            if path[-1] == "mean" and (*path[:-1], "var") in flat
        }

    def results(
        self,
        apply_fn: Callable[..., Any],
        shapes: Mapping[Path, tuple[int, ...]],
        axis_name: str | None,
        batches: Iterable[Any],
    ) -> Iterator[Any]:
        """Yield what the devices found in each batch, for `records`."""
        flat = self._flat()
        flat |= {(*path, NAME): Record.empty(shape) for path, shape in shapes.items()}
        variables = {**self.variables, COLLECTION: unflatten_dict(flat)}
        program = compiled(_measured, apply_fn, tuple(shapes), axis_name=axis_name)
        for batch in batches:
            yield program(variables, batch)

    def records(self, result: Any) -> dict[Path, Record]:
        """The records of the layers in one result, read back.

        Raises:
            TypeError: a layer took part that cannot be looked into.
        """
        records, moved = result
        for path, record in records.items():
            if moved[path].any() and not record.weight.any():
                raise TypeError(
                    f"recompute_batch_stats: layer {layer_name(path)} has a mean and a "
                    "variance in 'batch_stats' but is no flax.linen.BatchNorm, so that "
                    "what it is given is not known. Derive it from that class or from "
                    "bnjax.linen.BatchNorm, or leave it out with layers=..."
                )
        return records

    def values(self, path: Path) -> tuple[Any, Any]:
        """The mean and the variance that a layer has now."""
        flat = self._flat()
        return flat[(*path, "mean")], flat[(*path, "var")]

    def with_stats(self, stats: Mapping[Path, tuple[Any, Any]]) -> Any:
        """The collection with another mean and variance for some layers."""
        new: dict[Path, Any] = {
            (*path, name): value
            for path, pair in stats.items()
            for name, value in zip(("mean", "var"), pair, strict=True)
        }
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: new.get(_names(keys), leaf), self.variables[COLLECTION]
        )

    def _flat(self) -> dict[Path, Any]:
        return dict(flatten_dict(unfreeze(self.variables.get(COLLECTION, {}))))


def _measured(
    apply_fn: Callable[..., Any], paths: tuple[Path, ...], variables: Any, batch: Any
) -> tuple[dict[Path, Record], dict[Path, jax.Array]]:
    """The record of each layer, and whether its running mean moved."""
    with nn.intercept_methods(_record_input):
        output = apply_fn(variables, batch)
    found = _with_names(output)
    ends = [name[: -len(paths[0]) - 1] for name in found if name[-1:] == (NAME,)]
    for start in ends:
        if all((*start, *path, NAME) in found for path in paths):
            break
    else:
        raise ValueError(
            "recompute_batch_stats: apply_fn returns no updated 'batch_stats'; "
            f"{TRAINING}. What else it returns does not matter."
        )
    old = _with_names(variables[COLLECTION])
    records, moved = {}, {}
    for path in paths:
        records[path] = found[(*start, *path, NAME)]
        before, after = old[(*path, "mean")], found[(*start, *path, "mean")]
        stacked = jnp.reshape(after, (-1, *before.shape)).astype(before.dtype)
        moved[path] = jnp.any((stacked != before[None]) & jnp.isfinite(stacked))
    return records, moved


def _record_input(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Call a module; note what it was given if it is a layer that trains."""
    layer = context.module
    recorded = (
        isinstance(layer, nn.BatchNorm)
        and context.method_name == "__call__"
        and layer.has_variable(COLLECTION, NAME)
    )
    if not recorded:
        return call(*args, **kwargs)
    record = layer.get_variable(COLLECTION, NAME)
    y = call(*args, **kwargs)
    # A call of the class it extends, or in a transform, may have noted it already.
    noted = layer.get_variable(COLLECTION, NAME) is not record
    if is_training(layer, args, kwargs) and not noted:
        name = f"BatchNorm layer {layer_name(layer.path)}"
        x = args[0] if args else kwargs["x"]
        joined = record.joined(layer, name, x, kwargs.get("mask"))
        layer.put_variable(COLLECTION, NAME, joined)
    return y


def _with_names(tree: Any) -> dict[Path, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Record)
    )
    return {_names(keys): leaf for keys, leaf in leaves}


def _names(keys: tuple[Any, ...]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
