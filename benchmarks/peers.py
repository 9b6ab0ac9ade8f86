"""The batch normalization layer of each library, as a function and in a network.

Every layer is called as in its library: in mixed precision with float32 parameters and
statistics and an output of the input's dtype. Equinox's layer is called per example
under vmap, with the channels first. If a layer has no ReLU or residual, these are
operations after the layer. `make` returns one layer as a pure function of its
variables; `PeerNorm` replaces the `Normalization` of a network of `bnjax.models`.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import bnjax.linen
from bnjax.variants.ghost import GhostBatchNorm
from bnjax.variants.renorm import BatchRenorm

MOMENTUM, EPSILON = 0.99, 1e-5
VARIATIONS = ("plain", "relu", "residual")


@dataclasses.dataclass(frozen=True)
class Case:
    """What one layer is given.

    Args:
        shape: of the input, channels last.
        dtype: of input and output.
        variation: "plain"; "relu" after the layer; "residual", added before a ReLU.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    variation: str = "plain"

    @property
    def bytes(self) -> int:
        """Of one array of the shape."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """The shape, as the command line takes it."""
        return "x".join(map(str, self.shape))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer as a pure function.

    Args:
        params: pytree.
        state: pytree of the running statistics.
        apply: from params, state, x, residual (or None) and whether it trains, to y
            and the new state.
        scale_and_bias: from a pytree like `params` to two vectors.
        channels_first: whether x is of shape (batch, channels, ...).
    """

    params: Any
    state: Any
    apply: Callable[[Any, Any, Any, Any, bool], tuple[Any, Any]]
    scale_and_bias: Callable[[Any], tuple[jax.Array, jax.Array]]
    channels_first: bool = False


@functools.lru_cache(maxsize=1)
def arrays(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the float32 arrays of a case.

    The gradient is one that the input has a share in: iterated, the gradient of x then
    stays far from zero. The running statistics make inference a contraction.
    """
    random = np.random.default_rng(seed)
    normal = random.standard_normal((2, *case.shape), np.float32)
    features = case.shape[-1]
    found = {
        "x": 0.5 + normal[0],
        "dy": 0.5 * normal[0] + normal[1],
        "scale": random.uniform(0.5, 0.9, features),
        "bias": random.uniform(-0.2, 0.2, features),
        "mean": random.uniform(-0.2, 0.2, features),
        "var": random.uniform(1.0, 1.5, features),
    }
    if case.variation == "residual":
        found["residual"] = random.standard_normal(case.shape, np.float32)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def make(peer: str, case: Case, values: dict[str, np.ndarray]) -> Layer:
    """Build a layer of one of `PEERS`.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    return PEERS[peer](case, {name: jnp.asarray(x) for name, x in values.items()})


def _then(case: Case, y: jax.Array, residual: jax.Array | None) -> jax.Array:
    """Apply what comes after a layer that is batch normalization alone."""
    if residual is not None:
        y = y + residual
    return y if case.variation == "plain" else jax.nn.relu(y)


def _linen(case: Case, values: dict[str, Any], ours: bool) -> Layer:
    options: dict[str, Any] = {
        "momentum": MOMENTUM,
        "epsilon": EPSILON,
        "dtype": case.dtype,
    }
    if ours and case.variation != "plain":
        options["activation"] = "relu"
    kind = bnjax.linen.BatchNorm if ours else linen.BatchNorm

    def apply(params, state, x, residual, train):
        layer = kind(use_running_average=not train, **options)
        variables = {"params": params, "batch_stats": state}
        given = {"residual": residual} if ours else {}
        y, updates = layer.apply(variables, x, mutable=["batch_stats"], **given)
        return y if ours else _then(case, y, residual), updates["batch_stats"]

    return Layer(
        {"scale": values["scale"], "bias": values["bias"]},
        {"mean": values["mean"], "var": values["var"]},
        apply,
        lambda params: (params["scale"], params["bias"]),
    )


def _flax_nnx(case: Case, values: dict[str, Any]) -> Layer:
    layer = nnx.BatchNorm(
        case.shape[-1],
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype=case.dtype,
        rngs=nnx.Rngs(0),
    )
    for name in ("scale", "bias", "mean", "var"):
        getattr(layer, name)[...] = values[name]
    graph, params, state = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def apply(params, state, x, residual, train):
        layer = nnx.merge(graph, params, state, copy=True)
        y = layer(x, use_running_average=not train)
        return _then(case, y, residual), nnx.state(layer, nnx.BatchStat)

    return Layer(
        params, state, apply, lambda params: (params["scale"][...], params["bias"][...])
    )


def _haiku(case: Case, values: dict[str, Any]) -> Layer:
    hk = importlib.import_module("haiku")

    def forward(x, train):
        layer = hk.BatchNorm(True, True, MOMENTUM, EPSILON, name="bn")
        # Its parameters have the dtype of what it is given, and so do its sums.
        return layer(x.astype("float32"), is_training=train).astype(case.dtype)

    transformed = hk.without_apply_rng(hk.transform_with_state(forward))
    example = jnp.zeros((1,) * (len(case.shape) - 1) + case.shape[-1:])
    params, state = transformed.init(None, example, True)
    shape = params["bn"]["scale"].shape
    params = {
        "bn": {
            "scale": values["scale"].reshape(shape),
            "offset": values["bias"].reshape(shape),
        }
    }
    for name in ("mean", "var"):
        key = f"bn/~/{name}_ema"
        average = values[name].reshape(shape)
        state[key] = {**state[key], "average": average, "hidden": average}

    def apply(params, state, x, residual, train):
        y, state = transformed.apply(params, state, x, train)
        return _then(case, y, residual), state

    return Layer(
        params,
        state,
        apply,
        lambda params: (params["bn"]["scale"].ravel(), params["bn"]["offset"].ravel()),
    )


def _equinox(case: Case, values: dict[str, Any]) -> Layer:
    eqx = importlib.import_module("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        case.shape[-1], "batch", eps=EPSILON, momentum=MOMENTUM, mode="batch"
    )
    layer = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias),
        layer,
        (values["scale"], values["bias"]),
    )
    state = state.set(layer.batch_state_index, (values["mean"], values["var"]))
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x, residual, train):
        layer = eqx.nn.inference_mode(eqx.combine(params, static), not train)
        # It sums in the dtype it is given; from bfloat16 sums dx is off by 40 %.
        x = x.astype("float32")
        y, state = jax.vmap(
            layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(x, state)
        return _then(case, y.astype(case.dtype), residual), state

    return Layer(
        params,
        state,
        apply,
        lambda params: (params.weight, params.bias),
        channels_first=True,
    )


PEERS: dict[str, Callable[[Case, dict[str, Any]], Layer]] = {
    "bnjax": functools.partial(_linen, ours=True),
    "flax.linen": functools.partial(_linen, ours=False),
    "flax.nnx": _flax_nnx,
    "haiku": _haiku,
    "equinox": _equinox,
}

NORM_KINDS = {
    "none": None,
    "flax": "flax.linen",
    "nnx": "flax.nnx",
    "haiku": "haiku",
    "equinox": "equinox",
    "bnjax": "bnjax",
    "bnjax_inside": "bnjax",
    "renorm": "renorm",
    "ghost": "ghost",
}
"""What a `PeerNorm` may be, and whose layer of `PEERS` it is.

"none" leaves the activation; "bnjax_inside" gives activation and residual to the layer,
where "bnjax" and all others have them as operations after it. "renorm" and "ghost" are
variants of ours: batch renormalization, and four virtual batches.
"""
VIRTUAL_BATCHES = 4
_LINEN: dict[str | None, Callable[..., linen.Module]] = {
    "flax.linen": linen.BatchNorm,
    "bnjax": bnjax.linen.BatchNorm,
    "renorm": BatchRenorm,
    "ghost": GhostBatchNorm,
}


@dataclasses.dataclass(frozen=True)
class PeerNorm:
    """A library's layer in training, in place of `bnjax.models.Normalization`.

    The networks of all kinds have the same parameters but for the layer's own.

    Args:
        kind: of `NORM_KINDS`.
        axis_name: share statistics with the devices of this axis; bnjax and flax.linen.
    """

    kind: str
    axis_name: str | None = None
    needs_bias: bool = dataclasses.field(default=False, init=False)

    def __call__(
        self,
        x: jax.Array,
        *,
        activation: str,
        name: str,
        residual: jax.Array | None = None,
        dtype: Any = None,
        **_: Any,
    ) -> jax.Array:
        """Return activation(BN(x) + residual), as `Normalization` does."""
        peer, inside = NORM_KINDS[self.kind], self.kind == "bnjax_inside"
        if peer in _LINEN:
            options: dict[str, Any] = {
                "use_running_average": False,
                "momentum": MOMENTUM,
                "epsilon": EPSILON,
                "axis_name": self.axis_name,
                "dtype": dtype,
                "name": name,
            }
            if peer == "ghost":
                options["virtual_batch_size"] = max(len(x) // VIRTUAL_BATCHES, 1)
            if inside:
                options["activation"] = None if activation == "identity" else activation
                return _LINEN[peer](**options)(x, residual=residual)
            x = _LINEN[peer](**options)(x)
        elif peer is not None:
            x = _PeerModule(peer, name=name)(x)
        if residual is not None:
            x = x + residual
        return x if activation == "identity" else getattr(jax.nn, activation)(x)


class _PeerModule(linen.Module):
    """A layer of `PEERS`, its variables kept as those of a linen module."""

    peer: str

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Of values that are the same in every layer: only shapes and dtypes matter.
        vectors = ("scale", "bias", "mean", "var")
        ones = {name: np.ones(x.shape[-1], np.float32) for name in vectors}
        with jax.ensure_compile_time_eval():
            layer = make(self.peer, Case(x.shape, x.dtype.name), ones)
        leaves, tree = jax.tree.flatten(layer.params)
        held, state_tree = jax.tree.flatten(layer.state)
        params = jax.tree.unflatten(tree, self.param("leaves", lambda _: tuple(leaves)))
        variable = self.variable("batch_stats", "leaves", lambda: tuple(held))
        state = jax.tree.unflatten(state_tree, variable.value)
        if layer.channels_first:
            x = jnp.moveaxis(x, -1, 1)
        y, state = layer.apply(params, state, x, None, True)
        if not self.is_initializing():
            variable.value = tuple(jax.tree.leaves(state))
        return jnp.moveaxis(y, 1, -1) if layer.channels_first else y
