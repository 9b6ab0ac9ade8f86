"""The batch norm layers of a flax.nnx model, and what a batch tells about them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from bnjax.population.devices import compiled
from bnjax.population.records import NAME, Path, Record, is_training

TRAINING = (
    "expected the call of a training step, such as lambda model, batch: model(batch), "
    "after model.train(), in which the layers have use_running_average=False"
)


@dataclasses.dataclass(frozen=True)
class NnxLayers:
    """The layers of a model of flax.nnx.

    Args:
        model: stays as it is.
    """

    model: nnx.Module
    training: ClassVar[str] = TRAINING

    def shapes(self) -> dict[Path, tuple[int, ...]]:
        """The shape of the statistics of each layer."""
        return {path: bn.mean.shape for path, bn in _layers(self.model).items()}

    def results(
        self,
        apply_fn: Callable[..., Any],
        shapes: Mapping[Path, tuple[int, ...]],
        axis_name: str | None,
        batches: Iterable[Any],
    ) -> Iterator[Any]:
        """Yield what the devices found in each batch, for `records`."""
        model = nnx.clone(self.model)
        found = _layers(model)
        for path, shape in shapes.items():
            layer = found[path]
            setattr(layer, NAME, nnx.BatchStat(Record.empty(shape)))
            layer.__class__ = _recording(type(layer))
        graphdef, streams, rest = nnx.split(model, nnx.RngState, ...)
        program = compiled(
            _measured, apply_fn, graphdef, tuple(shapes), axis_name=axis_name
        )
        for batch in batches:
            result, streams = program((streams, rest), batch)
            yield result

    def records(self, result: dict[Path, Record]) -> dict[Path, Record]:
        """The records of the layers in one result, read back."""
        return result

    def values(self, path: Path) -> tuple[jax.Array, jax.Array]:
        """The mean and the variance that a layer has now."""
        layer = _layers(self.model)[path]
        return layer.mean[...], layer.var[...]

    def with_stats(self, stats: Mapping[Path, tuple[Any, Any]]) -> nnx.State:
        """The state of all BatchStat, with another mean and variance for some."""
        model = nnx.clone(self.model)
        layers = _layers(model)
        for path, (mean, var) in stats.items():
            layers[path].mean[...], layers[path].var[...] = mean, var
        return nnx.state(model, nnx.BatchStat)


def _layers(model: nnx.Module) -> dict[Path, nnx.BatchNorm]:
    return {
        path: node
        for path, node in nnx.iter_modules(model)
        if isinstance(node, nnx.BatchNorm)
    }


def _measured(
    apply_fn: Callable[..., Any],
    graphdef: Any,
    paths: tuple[Path, ...],
    state: Any,
    batch: Any,
) -> tuple[dict[Path, Record], nnx.State]:
    """The record of each layer, and the random streams after the call."""
    model = nnx.merge(graphdef, *state)
    apply_fn(model, batch)
    layers = _layers(model)
    records = {path: getattr(layers[path], NAME).get_value() for path in paths}
    return records, nnx.state(model, nnx.RngState)


@functools.cache
def _recording(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """A class that notes what its layers are given where they train."""

    def call(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, x, *args, **kwargs)
        if is_training(self, (x, *args), kwargs):
            name = f"BatchNorm layer of {self.num_features} features"
            record = getattr(self, NAME)
            joined = record.get_value().joined(self, name, x, kwargs.get("mask"))
            record.set_value(joined)
        return y

    return type(f"Recording{kind.__name__}", (kind,), {"__call__": call})
