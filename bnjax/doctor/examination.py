"""Run one training call, trace one call of evaluation, and collect the facts."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bnjax._validate import layer_name
from bnjax.doctor.arrays import (
    Network,
    nonfinite_array,
    params_by_path,
    path_of,
    with_params,
)
from bnjax.doctor.calls import (
    DropoutCall,
    NonFiniteFinder,
    NormCall,
    Observer,
    host,
    observed,
    observing,
)
from bnjax.doctor.facts import Batch, Examination, Layer
from bnjax.doctor.order import Order
from bnjax.population import LinenNetwork, NnxNetwork

Call = Callable[[Any, Any], Any]


def examine(
    network: Network,
    train: Call,
    evaluate: Call | None,
    batch: Any,
    params_before_average: Any,
    axis_name: str | None,
) -> Examination:
    """Call the network, and return all facts except replicas and decay."""
    stats = network.stats()
    shapes = {path: jnp.shape(mean) for path, (mean, _) in stats.items()}
    function, known, carry, rest = network.prepare(shapes)
    observer, state = Observer(training=True), (carry, rest)
    run = functools.partial(_run, function, known, train, observer)
    program = jax.jit(_over_one_device(run, axis_name))
    # An error from preparing the network names recompute_batch_stats.
    try:
        traced = program.trace(state, batch)
    except (TypeError, ValueError) as error:
        error.args = (str(error).replace("recompute_batch_stats", "doctor"),)
        raise
    calls = tuple(observer.calls)
    records, finite = program(state, batch)
    before = {}
    if params_before_average is not None:
        _, _, carry, rest = with_params(network, params_before_average).prepare(shapes)
        before, _ = program((carry, rest), batch)
    nonfinite = nonfinite_array(network, batch)
    if nonfinite is None and not np.all(finite):
        # Under an axis name, values inside the program cannot be read.
        nonfinite = axis_name is None and _first_nonfinite(network, train, batch)
        nonfinite = nonfinite or ("(model)", "output")
    eval_calls = _eval_calls(network, evaluate, batch, axis_name)

    params, layers = params_by_path(network), {}
    for path, (mean, var) in stats.items():
        name = layer_name(path)
        scale = params.get("/".join(map(str, (*path, "scale"))))
        layers[name] = Layer(
            path=name,
            mean=host(mean).ravel(),
            var=host(var).ravel(),
            dtype=mean.dtype,
            scale=None if scale is None else host(scale).ravel(),
            calls=_norm_calls(calls, name),
            eval_calls=_norm_calls(eval_calls, name),
            batch=_moments(records.get(path)),
            before=_moments(before.get(path)),
            moved=path in records and bool(np.any(records[path][1])),
        )
    order = _order(network, traced.jaxpr, state, batch, params)
    met = dict.fromkeys(call.path for call in calls if call.path in layers)
    return Examination(
        layers=tuple(layers[name] for name in {**met, **layers}),
        eval_dropouts=tuple(
            {c.path: c for c in eval_calls if isinstance(c, DropoutCall)}.values()
        ),
        nonfinite=nonfinite,
        **_before_layers(order, calls, layers),
    )


def _run(
    function: Any, known: Any, train: Call, observer: Observer, state: Any, batch: Any
) -> Any:
    """Return the records of the layers, and whether each output is finite."""
    outputs = []

    def call(variables: Any, batch: Any) -> Any:
        if isinstance(variables, nnx.Module):
            variables = observed(variables)
        outputs.append(train(variables, batch))
        return outputs[-1]

    observer.calls.clear()
    with observing(observer):
        records, _ = function(call, *known, state, batch)
    floats = (
        leaf
        for leaf in jax.tree.leaves(outputs)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    )
    return records, [jnp.isfinite(leaf).all() for leaf in floats]


def _over_one_device(run: Call, axis_name: str | None) -> Call:
    """Return `run` under an axis of one device, which holds all that is shared."""
    if axis_name is None:
        return run

    def mapped(state: Any, batch: Any) -> Any:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)
        call = functools.partial(run, state)
        found = jax.vmap(call, axis_name=axis_name)(batch)
        return jax.tree.map(lambda leaf: leaf[0], found)

    return mapped


def _eval_calls(
    network: Network, evaluate: Call | None, batch: Any, axis_name: str | None
) -> tuple[NormCall | DropoutCall, ...]:
    """Return the calls of layers in evaluation, which is only traced."""
    if evaluate is None:
        return ()
    observer = Observer(training=False)

    def run(state: Any, batch: Any) -> Any:
        with observing(observer):
            if isinstance(network, LinenNetwork):
                return evaluate(state, batch)
            model = nnx.merge(graphdef, state)
            model.eval()
            return evaluate(observed(model), batch)

    state: Any = None
    if isinstance(network, NnxNetwork):
        graphdef, state = nnx.split(nnx.clone(network.model))
    else:
        state = network.variables
    jax.eval_shape(_over_one_device(run, axis_name), state, batch)
    return tuple(observer.calls)


def _first_nonfinite(
    network: Network, train: Call, batch: Any
) -> tuple[str, str] | None:
    """Run the modules one by one; return the first with a value that is not finite."""
    finder = NonFiniteFinder()
    with observing(finder):
        if isinstance(network, LinenNetwork):
            train(network.variables, batch)
        else:
            train(observed(nnx.clone(network.model)), batch)
    return finder.found


def _norm_calls(calls: Iterable[Any], path: str) -> tuple[NormCall, ...]:
    return tuple(c for c in calls if isinstance(c, NormCall) and c.path == path)


def _moments(record: Any) -> Batch | None:
    """Return the record of a layer on the host, or None if there is none."""
    if record is None:
        return None
    noted, _ = record
    mean, var, count = (
        host(leaf).ravel()
        for leaf in (noted.moments.mean, noted.moments.var, noted.moments.count)
    )
    return Batch(mean, var, count) if count.any() else None


def _order(network: Network, closed: Any, state: Any, batch: Any, params: Any) -> Order:
    paths, data = [], []
    for keys, _ in jax.tree_util.tree_leaves_with_path((state, batch)):
        # The arguments are ((carry, rest), batch); random streams count as data.
        own = keys[0].idx == 0 and keys[1].idx == 1
        path = path_of(network, keys[2:]) if own else None
        paths.append(path if path in params else None)
        data.append(not own)
    return Order(closed, paths, data)


def _before_layers(
    order: Order, calls: tuple[Any, ...], layers: dict[str, Layer]
) -> dict[str, Any]:
    """Return the biases, norms and dropouts before each layer."""
    biases, norms, dropouts = {}, {}, {}
    for number, call in enumerate(calls):
        if not isinstance(call, NormCall) or call.path not in layers:
            continue
        before = order.norm_before(number)
        if before is not None and getattr(calls[before], "plain", False):
            norms[call.path, calls[before].path] = None
        if call.frozen:
            continue
        for path in order.biases(number, layers[call.path].mean.size):
            biases[path, call.path] = None
        for other in sorted(order.calls_before(number)):
            if isinstance(dropout := calls[other], DropoutCall):
                dropouts[call.path, dropout] = None
    return {
        "biases": tuple(biases),
        "norms": tuple(norms),
        "dropouts": tuple(dropouts),
    }
