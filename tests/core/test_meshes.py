"""Arrays sharded over meshes of either axis type, inside and outside a context."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(16, 4, 4, 4)))
DY, RESIDUAL = np.float32(RNG.normal(size=(2, *X.shape)))
SCALE, BIAS = np.linspace(0.5, 1, 4, dtype=np.float32), np.full(4, 0.1, np.float32)
MASK = (np.arange(16) % 3 != 0).reshape(16, 1, 1, 1)

SPECS = {
    "replicated": P(),
    "rows": P("data"),
    "rows over both axes": P(("data", "model")),
    "rows and height": P("data", "model"),
    "rows and channels": P("data", None, None, "model"),
    "channels": P(None, None, None, "model"),
}


def functional(activation, x, scale, bias, dy, mask, residual):
    def loss(x, scale, bias, residual):
        y, new = bnjax.batch_norm(
            x,
            scale,
            bias,
            bnjax.BatchStats.init(4),
            mask=mask,
            activation=activation,
            residual=residual,
        )
        return jnp.sum(y * dy), (y, new)

    argnums = (0, 1, 2) if residual is None else (0, 1, 2, 3)
    return jax.grad(loss, argnums, has_aux=True)(x, scale, bias, residual)


def linen(activation, x, scale, bias, dy, mask, residual):
    layer = bnjax.linen.BatchNorm(use_running_average=False, activation=activation)
    batch_stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

    def loss(x, params):
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = layer.apply(
            variables, x, mask=mask, residual=residual, mutable=["batch_stats"]
        )
        return jnp.sum(y * dy), (y, new)

    params = {"scale": scale, "bias": bias}
    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


def in_nnx(activation, x, scale, bias, dy, mask, residual):
    layer = bnjax.nnx.BatchNorm(4, activation=activation, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = scale, bias
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(x, params):
        layer = nnx.merge(graph, params, rest, copy=True)
        y = layer(x, mask=mask, residual=residual)
        return jnp.sum(y * dy), (y, layer.mean[...], layer.var[...])

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


@pytest.mark.parametrize("within", [False, True], ids=["outside", "in a context"])
@pytest.mark.parametrize(
    "layout",
    [
        *("replicated", "rows", "rows and channels", "channels"),
        pytest.param("rows over both axes", marks=pytest.mark.slow),
        pytest.param("rows and height", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("step", [functional, linen, in_nnx])
@pytest.mark.parametrize(
    ("activation", "masked", "with_residual"),
    [
        ("relu", False, True),
        ("relu", True, False),
        pytest.param(None, False, False, marks=pytest.mark.slow),
        pytest.param("gelu", True, True, marks=pytest.mark.slow),
        pytest.param(None, True, False, marks=pytest.mark.slow),
        pytest.param("relu", False, False, marks=pytest.mark.slow),
        pytest.param("gelu", False, False, marks=pytest.mark.slow),
    ],
)
def test_same_as_on_one_device(
    activation, masked, with_residual, step, axis_type, layout, within
):
    step = jax.jit(step, static_argnums=0)
    mask = MASK if masked else None
    residual = RESIDUAL if with_residual else None
    want = step(activation, X, SCALE, BIAS, DY, mask, residual)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    spec = SPECS[layout]
    channels = P(spec[3]) if len(spec) > 3 else P()

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        got = step(
            activation,
            put(X, spec),
            put(SCALE, channels),
            put(BIAS, channels),
            put(DY, spec),
            put(mask, P(*spec[:1])),
            put(residual, spec),
        )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=3e-5)
