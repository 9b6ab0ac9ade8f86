"""Statistics of every batch norm layer over a population, with fixed parameters."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from bnjax.population.devices import on_host, placed_like
from bnjax.population.linen_layers import LinenLayers
from bnjax.population.nnx_layers import NnxLayers
from bnjax.population.records import Path, Record, layer_name
from bnjax.population.selection import Layers, chosen
from bnjax.population.totals import Method, Totals, check_method


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
    """Estimate the statistics of batch norm layers again, over batches of examples.

    With the parameters fixed, and each layer given what the layers below it make of the
    batch in training, for batches B of m values per channel:

    - "paper": mean = E_B[mu_B], var = E_B[m / (m - 1) * var_B];
    - "pooled": the mean of all n values, and their unbiased variance, that of the
      batches' means included.

    Means over batches are weighted by the number of values, which a mask lowers. The
    sums over batches are taken in float64 on the host, so that their order does not
    matter. Moments are those of the layers' inputs: neither their momentum nor the old
    statistics have any part in them.

    Args:
        apply_fn: the call of a training step, `apply_fn(variables, batch)`. For linen
            it returns, among others, the updated "batch_stats", as `model.apply(...,
            mutable=["batch_stats"])` does; for nnx it calls the model. Compiled here,
            once for one function: define it outside of a loop.
        variables: of a linen network, "params" and "batch_stats" among them; or an
            nnx.Module. They stay as they are.
        batches: what `apply_fn` takes, one after the other: arrays or trees of arrays,
            also global ones that are sharded over devices and processes.
        method: "paper" or "pooled". For small batches "pooled" is the more exact.
        num_batches: how many to take; all if None.
        axis_name: run on several devices by pmap with this name: the arrays of a batch
            have a first axis of one entry for each device of this process. Each entry
            is a mini-batch, unless the layers share statistics by an axis_name of
            their own.
        layers: None for all. Otherwise the names of those to estimate, such as
            "block/bn", or patterns such as "block/*", one or several, or a function of
            the name that says which. The others keep their statistics.

    Returns:
        For linen the new collection "batch_stats", of the same tree, shapes and dtypes:
        `{**variables, "batch_stats": new}`. For nnx the nnx.State of all BatchStat:
        `nnx.update(model, new)`. A layer that normalizes by its running statistics
        (frozen), or a channel that a mask hides in all batches, keeps what it had.

    Raises:
        TypeError: `variables` is neither; a layer is no BatchNorm of Flax.
        ValueError: no batch norm layer, or none that trains; fewer batches than asked
            for; moments that are not finite, with layer and batch; one value per
            channel; unknown layers or method; shapes that do not fit.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.linen import BatchNorm
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
        (2016), "Revisiting Batch Normalization For Practical Domain Adaptation" (the
        statistics of another domain).
    """
    check_method(method)
    if num_batches is not None and num_batches < 1:
        raise ValueError(
            f"recompute_batch_stats: num_batches={num_batches}; expected 1 or more, or "
            "None for all."
        )
    network = _network(variables)
    shapes = network.shapes()
    if not shapes:
        raise ValueError(
            "recompute_batch_stats: the network has no batch norm layer: there is no "
            "mean and variance in its 'batch_stats'. Expected the variables of a "
            "network with flax's or bnjax's BatchNorm, as its init gives them."
        )
    shapes = {path: shapes[path] for path in chosen(layers, shapes)}
    given = itertools.islice(batches, num_batches)
    totals = dict.fromkeys(shapes, Totals())
    came = 0
    for result in on_host(network.results(apply_fn, shapes, axis_name, given)):
        for path, record in network.records(result).items():
            place = f"recompute_batch_stats: layer {layer_name(path)}, batch {came}"
            for part in _parts(record, shapes[path]):
                totals[path] = totals[path].add(part, method, place)
        came += 1
    if came == 0 or came < (num_batches or 0):
        raise ValueError(
            f"recompute_batch_stats: {came} batches came; expected "
            f"{num_batches or 'one or more'}. Give more, or a smaller num_batches; a "
            "generator that was gone through before gives none."
        )
    if not any(total.weight.any() for total in totals.values()):
        names = ", ".join(map(layer_name, shapes))
        raise ValueError(
            "recompute_batch_stats: no layer normalized by its batch, of "
            f"{names}; {network.training}."
        )
    return network.with_stats(
        {
            path: _statistics(total, method, path, network.values(path))
            for path, total in totals.items()
        }
    )


def _network(variables: Any) -> LinenLayers | NnxLayers:
    if isinstance(variables, nnx.Module):
        return NnxLayers(variables)
    if isinstance(variables, Mapping):
        return LinenLayers(variables)
    raise TypeError(
        f"recompute_batch_stats: variables is of type {type(variables).__name__}; "
        "expected a dict of collections such as {'params': ..., 'batch_stats': ...}, "
        "or an nnx.Module."
    )


def _parts(record: Record, shape: tuple[int, ...]) -> list[Record]:
    """What each device found, where several were at work: stacked or one by one."""
    stacked = jax.tree.map(lambda leaf: leaf.reshape(-1, *shape), record)
    count = stacked.weight.shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]


def _statistics(
    total: Totals, method: Method, path: Path, old: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """The new mean and variance, of the dtype and on the devices of the old ones."""
    mean, var = (
        placed_like(np.where(total.weight > 0, new, np.asarray(before)), before)
        for new, before in zip(
            total.mean_and_var(method, layer_name(path)), old, strict=True
        )
    )
    return mean, var
