"""Algorithm 2: statistics for inference, re-estimated with fixed parameters.

A batch goes through the network as in training. Each layer records the moments of its
input next to its own statistics, so that every transform that carries the statistics
(scan, vmap, remat, jit, pmap) also carries the record. The host sums the records over
batches.
"""

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.experimental import multihost_utils

import bnjax.linen
import bnjax.nnx
from bnjax import _validate, functional
from bnjax._validate import layer_name
from bnjax.functional import Moments

__all__ = ["recompute_batch_stats"]

Layers = str | Iterable[str] | Callable[[str], bool] | None
Method = Literal["paper", "pooled"]
Path = tuple[Any, ...]

COLLECTION = "batch_stats"
RECORD = "population_record"
NOTE = COLLECTION, RECORD


def recompute_batch_stats(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    method: Method = "paper",
    num_batches: int | None = None,
    axis_name: str | None = None,
    layers: Layers = None,
) -> Any:
    r"""Re-estimate the statistics of batch norm layers over batches of examples.

    The parameters are fixed, and each layer gets its input from the layers below it as
    in training. With the mean $\mu_B$ and the biased variance $\sigma_B^2$ of each
    batch $B$ of $m$ values per channel, the method gives

    - "paper": the mean $E_B[\mu_B]$ and the variance
      $E_B\left[\frac{m}{m - 1} \sigma_B^2\right]$;
    - "pooled": the mean of all $n$ values, and their unbiased variance. It includes the
      variance of the batches' means.

    The means over batches are weighted by the number of values, which a mask lowers.
    The host takes the sums over batches in float64, so that the order of the batches
    does not matter. The result does not depend on the layers' momentum or old
    statistics.

    Args:
        apply_fn: the call of a training step, `apply_fn(variables, batch)`. For linen
            its result must contain the updated "batch_stats", as that of
            `model.apply(..., mutable=["batch_stats"])` does. For nnx it calls the
            model. It is compiled once per function: define it outside of a loop.
        variables: variables of a linen network, including "params" and "batch_stats";
            or an nnx.Module. They are not changed.
        batches: the batches for `apply_fn`, one after the other: trees of arrays, also
            of global arrays that are sharded over devices and processes.
        method: "paper" or "pooled". For small batches "pooled" is more exact.
        num_batches: how many batches to use; all if None.
        axis_name: run on several devices by pmap with this name. The arrays of a batch
            then have a first axis with one entry for each device of this process. Each
            entry is a mini-batch, unless the layers share statistics by an axis_name of
            their own.
        layers: the layers to re-estimate; None for all. Names such as `block/bn` or
            patterns such as `block/*` (`*` also matches "/"), one or several, or a
            function of the name. All other layers keep their statistics.

    Returns:
        For linen, the new collection "batch_stats", of the same tree, shapes and
        dtypes: use it as `{**variables, "batch_stats": new}`. For nnx, the nnx.State of
        all BatchStat variables: use it as `nnx.update(model, new)`. A layer that
        normalizes by its running statistics (frozen) keeps its statistics, and so does
        a channel that a mask hides in all batches.

    Raises:
        TypeError: if `variables` or `layers` is of another type, or if a layer with
            statistics is not a BatchNorm of Flax or bnjax.
        ValueError: if there is no batch norm layer or no layer of that name, if too few
            batches came, if no layer normalized by its batch, or if a layer's input is
            not finite or has one value per channel.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.linen import BatchNorm
        >>> from bnjax.population import recompute_batch_stats
        >>> model = BatchNorm(use_running_average=False)
        >>> batches = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])
        >>> variables = model.init(jax.random.key(0), batches[0])
        >>> def train_call(variables, x):
        ...     return model.apply(variables, x, mutable=["batch_stats"])
        >>> new = recompute_batch_stats(train_call, variables, batches)
        >>> print(new["mean"], new["var"])
        [3.] [5.]
        >>> new = recompute_batch_stats(train_call, variables, batches, method="pooled")
        >>> print(new["mean"], new["var"])
        [3.] [4.6666665]

    References:
        Ioffe & Szegedy (2015), Algorithm 2, lines 7 to 12 ("paper"); Wu & Johnson
        (2021), "Rethinking 'Batch' in BatchNorm", section 3 ("pooled"); Li et al.
        (2016), "Revisiting Batch Normalization For Practical Domain Adaptation".
    """
    if method not in get_args(Method):
        raise ValueError(
            f"recompute_batch_stats: method={method!r}."
            f"{_validate.did_you_mean(str(method), get_args(Method))} Expected "
            "'paper', the mean of the batches' means and unbiased variances, or "
            "'pooled', the moments of all values together."
        )
    if num_batches is not None and num_batches < 1:
        raise ValueError(
            f"recompute_batch_stats: num_batches={num_batches}; expected 1 or more, or "
            "None for all."
        )
    if isinstance(variables, nnx.Module):
        network = NnxNetwork(variables)
    elif isinstance(variables, Mapping):
        network = LinenNetwork(variables)
    else:
        raise TypeError(
            f"recompute_batch_stats: variables is of type {type(variables).__name__}; "
            "expected a dict of collections such as {'params': ..., 'batch_stats': "
            "...}, or an nnx.Module."
        )
    old = network.stats()
    if not old:
        raise ValueError(
            "recompute_batch_stats: the network has no batch norm layer: there is no "
            "mean and variance in its 'batch_stats'. Expected the variables of a "
            "network with flax's or bnjax's BatchNorm, as its init returns them."
        )
    shapes = {path: jnp.shape(old[path][0]) for path in choose_layers(layers, old)}
    function, known, carry, rest = network.prepare(shapes)
    program = _compiled(function, apply_fn, *known, axis_name=axis_name)

    def recorded() -> Iterator[dict[Path, tuple[Record, Any]]]:
        nonlocal carry
        for batch in itertools.islice(batches, num_batches):
            found, carry = program((carry, rest), batch)
            yield found

    totals, count = dict.fromkeys(shapes, Total()), 0
    # In pairs: the result of a batch is read after the next batch has been started.
    for started, _ in itertools.pairwise(itertools.chain(recorded(), [None])):
        for path, (record, moved) in jax.tree.map(_on_host, started).items():
            place = f"recompute_batch_stats: layer {layer_name(path)}"
            if moved.any() and not record.weight.any():
                raise TypeError(
                    f"{place} has a mean and a variance in 'batch_stats' but is not a "
                    "flax.linen.BatchNorm, so its input cannot be recorded. Derive the "
                    "layer from that class or from bnjax.linen.BatchNorm, or exclude "
                    "it with layers=..."
                )
            # One record for each device, if there are several.
            leaves = [x.reshape(-1, *shapes[path]) for x in jax.tree.leaves(record)]
            for part in zip(*leaves, strict=True):
                totals[path] = totals[path].add(part, method, f"{place}, batch {count}")
        count += 1
    if count == 0 or count < (num_batches or 0):
        raise ValueError(
            f"recompute_batch_stats: there were {count} batches; expected "
            f"{num_batches or 'one or more'}. Pass more batches, or a smaller "
            "num_batches. A generator that was used before has no batches left."
        )
    if not any(total.weight.any() for total in totals.values()):
        raise ValueError(
            "recompute_batch_stats: none of these layers normalized by its batch: "
            f"{', '.join(map(layer_name, shapes))}; {network.training_call}."
        )
    new = {}
    for path, total in totals.items():
        found = total.mean_and_var(method, layer_name(path))
        new[path] = tuple(
            _placed_like(np.where(total.weight > 0, value, np.asarray(before)), before)
            for value, before in zip(found, old[path], strict=True)
        )
    return network.with_stats(new)


def choose_layers(layers: Layers, paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return the paths of the layers that `layers` selects."""
    names = {layer_name(path): path for path in paths}
    listed = f"Its batch norm layers are: {', '.join(names)}."
    if callable(layers):
        chosen = {name for name in names if layers(name)}
        if not chosen:
            raise ValueError(
                "recompute_batch_stats: the function `layers` is true for no layer; "
                f"expected at least one. {listed}"
            )
    else:
        patterns = ("*",) if layers is None else layers
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not patterns or not all(isinstance(each, str) for each in patterns):
            raise TypeError(
                f"recompute_batch_stats: layers={layers!r}; expected None for all, a "
                "name or a pattern such as 'block_1/*', several of them, or a function "
                f"of the name. {listed}"
            )
        fitting = {each: fnmatch.filter(names, each) for each in patterns}
        for pattern, found in fitting.items():
            if not found:
                raise ValueError(
                    f"recompute_batch_stats: layers={pattern!r} matches no layer."
                    f"{_validate.did_you_mean(pattern, names)} {listed}"
                )
        chosen = set(itertools.chain(*fitting.values()))
    return tuple(path for name, path in names.items() if name in chosen)


# The record of a layer.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """Moments of all inputs of a layer in one batch, over devices that share them.

    `weight` is this device's share of `moments.count`.
    """

    moments: Moments
    weight: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Record":
        """A record of no values, of the shape of the layer's statistics."""
        # NumPy arrays, because they go with JAX arrays on any devices.
        zeros: Any = np.zeros(shape, jnp.result_type(float))
        return cls(Moments(zeros, zeros, zeros), zeros)

    def joined(
        self, layer: Any, name: str, x: jax.Array, mask: Any, **variant: Any
    ) -> "Record":
        """This record merged with one more input of a layer; `name` is for errors."""
        shape, dtype, groups = jnp.shape(x), self.weight.dtype, layer.axis_index_groups
        with _validate.naming(name):
            if isinstance(layer, bnjax.linen.BatchNorm | bnjax.nnx.BatchNorm):
                mask = None if mask is None else _validate.broadcast_mask(mask, shape)
            elif mask is not None:
                # Flax reads every number except 0 as True, and broadcasts like NumPy.
                mask = jnp.broadcast_to(jnp.asarray(mask, bool), shape)
            shared = {"axis_name": layer.axis_name, "axis_index_groups": groups}
            # A layer with several populations assigns the values to them.
            find = getattr(layer, "moments_of", functional.moments)
            found = find(x, axis=layer.axis, mask=mask, **shared, **variant)
        if found.mean.size != self.weight.size:
            raise ValueError(
                f"{name}: its statistics in `variables` have shape "
                f"{self.weight.shape}, but its input of shape {shape} has statistics "
                f"of shape {found.mean.shape}; expected the same. Pass the variables "
                "of this network."
            )
        devices = 1 if layer.axis_name is None else lax.psum(1, **shared)
        old = jax.tree.map(jnp.asarray, self)
        found = jax.tree.map(lambda x: x.reshape(old.weight.shape).astype(dtype), found)
        return Record(old.moments.merge(found), old.weight + found.count / devices)


# The arguments that every batch norm layer's call may have.
_CALL = ("x", "use_running_average", "mask", "residual", "update_stats")


def _call_and_record(
    layer: Any, name: str, call: Any, args: Any, kwargs: Any, read: Any, write: Any
) -> Any:
    """Call a layer of linen or nnx; record its input if it is in training."""
    before = read()
    y = call(*args, **kwargs)
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    frozen = layer.use_running_average if given is None else given
    # `bnjax.convert` calls another layer in its place, which records its own input.
    if hasattr(layer, "exchanged_for"):
        return y
    # A call of a base class, or in a transform, may have recorded it already.
    if not frozen and read().weight is before.weight:
        x = args[0] if args else kwargs["x"]
        # Arguments of `moments_of` besides those that every layer has.
        variant = {n: v for n, v in kwargs.items() if n not in _CALL}
        write(before.joined(layer, name, x, kwargs.get("mask"), **variant))
    return y


# The layers of a network.


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """The batch norm layers of a network of flax.linen, found by its variables."""

    variables: Mapping[str, Any]
    training_call: ClassVar[str] = (
        "expected the call of a training step, such as lambda variables, batch: "
        "model.apply(variables, batch, train=True, mutable=['batch_stats']), in which "
        "the layers have use_running_average=False"
    )

    def stats(self) -> dict[Path, tuple[Any, Any]]:
        """The mean and the variance of each layer that has both."""
        flat = self._flat()
        return {
            path[:-1]: (leaf, flat[(*path[:-1], "var")])
            for path, leaf in flat.items()
            if path[-1] == "mean" and (*path[:-1], "var") in flat
        }

    def prepare(self, shapes: Mapping[Path, tuple[int, ...]]) -> tuple[Any, ...]:
        """A function, its static arguments, its carry and the rest of its state."""
        flat = self._flat()
        flat |= {(*path, RECORD): Record.empty(shape) for path, shape in shapes.items()}
        variables = {**self.variables, COLLECTION: unflatten_dict(flat)}
        return _linen_records, (tuple(shapes),), (), variables

    def with_stats(self, stats: Mapping[Path, tuple[Any, ...]]) -> Any:
        """The collection with a new mean and variance for some layers."""
        new = {(*path, "mean"): mean for path, (mean, _) in stats.items()}
        new |= {(*path, "var"): var for path, (_, var) in stats.items()}
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: new.get(_key_names(keys), leaf),
            self.variables[COLLECTION],
        )

    def _flat(self) -> dict[Path, Any]:
        return dict(flatten_dict(unfreeze(self.variables.get(COLLECTION, {}))))


def _linen_records(
    apply_fn: Callable[..., Any], paths: tuple[Path, ...], state: Any, batch: Any
) -> tuple[dict[Path, tuple[Record, jax.Array]], tuple[()]]:
    """The record of each layer and whether its running mean changed; no carry."""
    _, variables = state
    with nn.intercept_methods(_intercept_linen):
        output = apply_fn(variables, batch)
    found = _by_names(output)
    starts = [name[: -len(paths[0]) - 1] for name in found if name[-1:] == (RECORD,)]
    for start in starts:
        if all((*start, *path, RECORD) in found for path in paths):
            break
    else:
        raise ValueError(
            "recompute_batch_stats: apply_fn returns no updated 'batch_stats'; "
            f"{LinenNetwork.training_call}. It may return other values too."
        )
    old = _by_names(variables[COLLECTION])
    records = {}
    for path in paths:
        before, after = old[(*path, "mean")], found[(*start, *path, "mean")]
        stacked = jnp.reshape(after, (-1, *before.shape)).astype(before.dtype)
        moved = jnp.any((stacked != before[None]) & jnp.isfinite(stacked))
        records[path] = found[(*start, *path, RECORD)], moved
    return records, ()


def _intercept_linen(
    call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    layer, own = context.module, context.method_name == "__call__"
    if not (own and isinstance(layer, nn.BatchNorm)) or not layer.has_variable(*NOTE):
        return call(*args, **kwargs)
    name = f"BatchNorm layer {layer_name(layer.path)}"
    read = functools.partial(layer.get_variable, *NOTE)
    write = functools.partial(layer.put_variable, *NOTE)
    return _call_and_record(layer, name, call, args, kwargs, read, write)


def _by_names(tree: Any) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, Record)
    )
    return {_key_names(keys): leaf for keys, leaf in leaves}


def array_name(keys: tuple[Any, ...]) -> str:
    """Return the JAX path of an array as a name, such as "bn_0/scale"."""
    # The value of an nnx.Variable is an attribute.
    named = (key for key in keys if not isinstance(key, jax.tree_util.GetAttrKey))
    return "/".join(_key_names(tuple(named)))


def _key_names(keys: tuple[Any, ...]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


@dataclasses.dataclass(frozen=True)
class NnxNetwork:
    """The batch norm layers of a model of flax.nnx, which is not changed."""

    model: nnx.Module
    training_call: ClassVar[str] = (
        "expected the call of a training step, such as lambda model, batch: "
        "model(batch), after model.train(), in which the layers have "
        "use_running_average=False"
    )

    def stats(self) -> dict[Path, tuple[Any, Any]]:
        """The mean and the variance of each layer."""
        layers = _nnx_layers(self.model).items()
        return {path: (layer.mean[...], layer.var[...]) for path, layer in layers}

    def prepare(self, shapes: Mapping[Path, tuple[int, ...]]) -> tuple[Any, ...]:
        """A function, its static arguments, its carry and the rest of its state."""
        model = nnx.clone(self.model)
        layers = _nnx_layers(model)
        for path, shape in shapes.items():
            layer = layers[path]
            setattr(layer, RECORD, nnx.BatchStat(Record.empty(shape)))
            layer.__class__ = _recording(type(layer))
        graphdef, streams, rest = nnx.split(model, nnx.RngState, ...)
        return _nnx_records, (graphdef, tuple(shapes)), streams, rest

    def with_stats(self, stats: Mapping[Path, tuple[Any, ...]]) -> nnx.State:
        """The state of all BatchStat, with a new mean and variance for some layers."""
        model = nnx.clone(self.model)
        layers = _nnx_layers(model)
        for path, (mean, var) in stats.items():
            layers[path].mean[...], layers[path].var[...] = mean, var
        return nnx.state(model, nnx.BatchStat)


def _nnx_layers(model: nnx.Module) -> dict[Path, nnx.BatchNorm]:
    modules = nnx.iter_modules(model)
    return {path: node for path, node in modules if isinstance(node, nnx.BatchNorm)}


def _nnx_records(
    apply_fn: Callable[..., Any], graphdef: Any, paths: Any, state: Any, batch: Any
) -> tuple[dict[Path, tuple[Record, bool]], nnx.State]:
    """The record of each layer; the random streams after the call are the carry."""
    model = nnx.merge(graphdef, *state)
    apply_fn(model, batch)
    layers = _nnx_layers(model)
    records = {p: (getattr(layers[p], RECORD).get_value(), False) for p in paths}
    return records, nnx.state(model, nnx.RngState)


@functools.cache
def _recording(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """A class whose layers record their inputs in training."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = f"BatchNorm layer of {self.num_features} features"
        plain, record = functools.partial(kind.__call__, self), getattr(self, RECORD)
        return _call_and_record(
            self, name, plain, args, kwargs, record.get_value, record.set_value
        )

    return type(f"Recording{kind.__name__}", (kind,), {"__call__": call})


# The program on the devices, and the sums on the host.


@functools.lru_cache(maxsize=16)
def _compiled(
    function: Callable[..., Any], *known: Any, axis_name: str | None
) -> Callable[[Any, Any], Any]:
    """Return `function` compiled: it takes a network's state and a batch.

    With `axis_name`, it runs under pmap, and the records of all devices are stacked.
    The same arguments give the same function, so that a network is compiled once.
    """

    def run(state: Any, batch: Any) -> Any:
        try:
            return function(*known, state, batch)
        except NameError as error:
            error.add_note(
                "recompute_batch_stats: if an axis name is not bound, pass "
                "axis_name=... and batches with a first axis of devices, or call "
                "jax.pmap inside apply_fn."
            )
            raise

    if axis_name is None:
        return jax.jit(run)

    def on_each(state: Any, batch: Any) -> Any:
        records, carry = run(state, batch)
        return lax.all_gather(records, axis_name), carry

    mapped = jax.pmap(on_each, axis_name=axis_name, in_axes=(None, 0), out_axes=None)

    def checked(state: Any, batch: Any) -> Any:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        sizes = {shape[:1] for shape in shapes}
        count = jax.local_device_count()
        if len(sizes) != 1 or not sizes <= {(n + 1,) for n in range(count)}:
            raise ValueError(
                f"recompute_batch_stats: axis_name={axis_name!r} with a batch of "
                f"shapes {shapes}; expected a first axis of one entry for each device, "
                f"at most {count} here. For batches without that axis, do not pass "
                "axis_name."
            )
        return mapped(state, batch)

    return checked


def _on_host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _placed_like(value: np.ndarray, old: Any) -> jax.Array:
    """The value as an array of the dtype of `old`, on the devices that hold it."""
    value = value.astype(old.dtype)
    if getattr(old, "committed", False):
        return jax.device_put(value, old.sharding)
    return jnp.asarray(value)


class Total(NamedTuple):
    """Running total of one layer's inputs, in float64, per channel.

    Attributes:
        weight: number of values.
        mean: of all of them.
        squares: for "pooled", the sum of their squared distances from the mean; for
            "paper", the sum of weight_B * m / (m - 1) * var_B over the batches B.
    """

    weight: np.ndarray = np.zeros(())
    mean: np.ndarray = np.zeros(())
    squares: np.ndarray = np.zeros(())

    def add(self, record: Any, method: Method, place: str) -> "Total":
        """The total with one more record; `place` names layer and batch in errors."""
        mean, var, count, weight = map(np.float64, record)
        seen = weight > 0
        mean, var = np.where(seen, mean, 0), np.where(seen, var, 0)
        if not np.isfinite([weight, mean, var]).all():
            raise ValueError(
                f"{place}: the mean or the variance of the input is not finite; "
                "expected finite inputs. Look for NaN or infinity in that batch, for "
                "parameters that diverged, or for an overflow of float16."
            )
        if method == "paper" and np.any(seen & (count <= 1)):
            raise ValueError(
                f"{place}: one value per channel, which has no unbiased variance "
                "(m - 1 = 0); expected two or more. Use larger batches, or "
                "method='pooled'."
            )
        new_weight = self.weight + weight
        share = weight / np.where(new_weight > 0, new_weight, 1)
        delta = mean - self.mean
        if method == "paper":
            squares = weight * var * (count / np.maximum(count - 1, 1))
        else:
            squares = weight * var + np.square(delta) * self.weight * share
        return Total(new_weight, self.mean + delta * share, self.squares + squares)

    def mean_and_var(self, method: Method, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The population statistics of the layer called `name`."""
        if method == "paper":
            return self.mean, self.squares / np.where(self.weight > 0, self.weight, 1)
        if np.any((self.weight > 0) & (self.weight <= 1)):
            raise ValueError(
                f"recompute_batch_stats: layer {name} was given one value per channel "
                "in all batches; expected two or more."
            )
        return self.mean, self.squares / np.maximum(self.weight - 1, 1)
