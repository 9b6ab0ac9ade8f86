import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.population import recompute_batch_stats
from bnjax.variants.adaptation import (
    AdaptiveBatchNorm,
    NnxAdaptiveBatchNorm,
    adaptive_batch_norm,
)
from tests import oracle

WEIGHTS = [0.0, 3.0, 16.5, math.inf]


def data(shape=(7, 3, 5), seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.uniform(1, 3, shape[-1]) + 2
    scale, bias, mean = rng.normal(size=(3, shape[-1]))
    var = rng.uniform(0.5, 2, shape[-1])
    x, scale, bias, mean, var = (
        np.asarray(a, dtype) for a in (x, scale, bias, mean, var)
    )
    return x, scale, bias, bnjax.BatchStats(jnp.asarray(mean), jnp.asarray(var))


def expected(x, scale, bias, source, weight, mask=None, epsilon=1e-5, axis=-1):
    """Schneider et al. (2020), section 3; n counts examples, parts of one as well."""
    mean, var, count = oracle.moments(x, axis, mask)
    axes = oracle.reduction_axes(np.asarray(x), axis)
    each = math.prod(np.shape(x)[a] for a in axes if a)
    n = count / each
    of_batch = np.where(n > 0, n, 0) / np.maximum(weight + n, 1e-300)
    of_batch = np.where(count > 1, of_batch, 0)
    old_mean, old_var, scale, bias = (
        oracle.per_channel(a, np.asarray(x), axis)
        for a in (source.mean, source.var, scale, bias)
    )
    mean = (1 - of_batch) * old_mean + of_batch * mean
    var = (1 - of_batch) * old_var + of_batch * var
    y = scale * (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon) + bias
    return y, mean.squeeze(axes), var.squeeze(axes)


def check(found, wanted, **tolerance):
    y, stats = found
    for a, b in zip((y, stats.mean, stats.var), wanted, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@functools.partial(jax.jit, static_argnames="options")
def traced(x, scale, bias, source, weight, mask=None, options=()):
    return adaptive_batch_norm(
        x, scale, bias, source, source_weight=weight, mask=mask, **dict(options)
    )


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_blend(weight, x64):
    x, scale, bias, source = data()
    wanted = expected(x, scale, bias, source, weight)
    check(traced(x, scale, bias, source, weight), wanted, rtol=1e-12, atol=1e-12)
    found = adaptive_batch_norm(x, scale, bias, source, source_weight=weight)
    check(found, wanted, rtol=1e-12, atol=1e-12)


def test_other_feature_axes(x64):
    x, scale, bias, source = data((6, 4, 3, 5))
    turned = jnp.moveaxis(x, -1, 1)
    found = traced(turned, scale, bias, source, 4.0, options=(("axis", 1),))
    wanted = expected(turned, scale, bias, source, 4.0, axis=1)
    check(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_what_a_mask_hides_is_not_counted(weight, x64):
    x, scale, bias, source = data()
    masks = np.random.default_rng(1).random((2, *x.shape)) < 0.5
    masks[1] = masks[1, :, :1, :1]  # whole examples
    masks[0, ..., 1] = False
    masks[0, ..., 2] = False
    masks[0, 0, 0, 2] = True  # one value, which has no spread
    for mask in masks:
        wanted = expected(x, scale, bias, source, weight, mask)
        given = jnp.where(mask, x, jnp.nan)
        y, stats = traced(given, scale, bias, source, weight, mask)
        np.testing.assert_allclose(stats.mean, wanted[1], rtol=1e-12)
        np.testing.assert_allclose(stats.var, wanted[2], rtol=1e-12)
        np.testing.assert_allclose(y[mask], wanted[0][mask], rtol=1e-11, atol=1e-12)
    examples = masks[1, :, 0, 0]
    _, alone = traced(x[examples], scale, bias, source, weight)
    np.testing.assert_allclose(stats.var, alone.var, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_ends_are_the_plain_layer(training):
    """The batch alone as in training, or the running statistics as in inference."""
    x, scale, bias, source = data(dtype="float32")
    weight = 0.0 if training else math.inf
    wanted, _ = bnjax.batch_norm(
        x, scale, bias, source, use_running_average=not training, activation="relu"
    )
    for kind in (float, jnp.float32):
        y, _ = adaptive_batch_norm(
            x, scale, bias, source, source_weight=kind(weight), activation="relu"
        )
        np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=2e-6)


def test_gradients_go_through_the_batch(x64):
    x, scale, bias, source = data((4, 3, 2))

    def run(x, scale, bias, mean, var):
        stats = bnjax.BatchStats(mean, var)
        return traced(x, scale, bias, stats, 3.0, options=(("activation", "tanh"),))[0]

    check_grads(run, (x, scale, bias, source.mean, source.var), order=2, modes=["rev"])


def test_gradients_of_the_batch_alone_are_those_of_training(x64):
    x, scale, bias, source = data()
    dy = data(seed=1)[0]
    found = jax.grad(lambda *a: jnp.sum(traced(*a, source, 0.0)[0] * dy), (0, 1, 2))
    wanted = oracle.backward(x, scale, dy)
    for a, b in zip(found(x, scale, bias), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_half_precision(strict):
    x, scale, bias, source = data(dtype="float32")
    x = jnp.asarray(x, "bfloat16")
    y, stats = traced(x, scale, bias, source, 3.0)
    assert (y.dtype, stats.mean.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = expected(np.asarray(x, "float64"), scale, bias, source, 3.0)
    np.testing.assert_allclose(stats.var, wanted[2], rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(y, "float32"), wanted[0], rtol=5e-3, atol=5e-3
    )


def test_eight_devices_and_vmap():
    x, scale, bias, source = data((24, 3, 5), dtype="float32")
    wanted = expected(x, scale, bias, source, 9.0)

    def run(x, **options):
        return adaptive_batch_norm(x, scale, bias, source, source_weight=9.0, **options)

    shared = functools.partial(run, axis_name="data")
    mesh, spec = jax.make_mesh((8,), ("data",)), PartitionSpec("data")
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    by_shard = jax.shard_map(
        shared, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec())
    )
    stacked = x.reshape(8, 3, 3, 5)
    check(jax.jit(run)(sharded), wanted, rtol=1e-5, atol=1e-5)
    check(jax.jit(by_shard)(sharded), wanted, rtol=1e-5, atol=1e-5)
    by_vmap = jax.vmap(shared, out_axes=(0, None), axis_name="data")
    y, stats = jax.jit(by_vmap)(stacked)
    check((y.reshape(x.shape), stats), wanted, rtol=1e-5, atol=1e-5)
    y, stats = jax.jit(jax.vmap(run))(stacked)
    for i, part in enumerate(stacked):
        one = (y[i], jax.tree.map(lambda leaf, i=i: leaf[i], stats))
        check(one, expected(part, scale, bias, source, 9.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_weight": -1.0}, ValueError, "source_weight=-1.0; expected 0 or more"),
        ({"source_weight": math.nan}, ValueError, "source_weight=nan"),
        ({"source_weight": None}, TypeError, "source_weight=None is not a number"),
        ({"source_weight": 1, "axis": 0}, ValueError, "first axis of x a feature axis"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        adaptive_batch_norm(
            jnp.zeros((4, 5)), None, None, bnjax.BatchStats.init(5), **options
        )


class Network(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            norm = self.norm(activation="relu", name=f"bn_{i}")
            x = norm(nn.Dense(6, use_bias=False)(x), not train)
        return x


def adapted(weight):
    return Network(functools.partial(AdaptiveBatchNorm, source_weight=weight))


def trained():
    """A network and its variables after a step."""
    x = data((9, 5), dtype="float32")[0]
    network = Network(bnjax.linen.BatchNorm)
    variables = network.init(jax.random.key(0), x, True)
    _, updates = network.apply(variables, x, True, mutable=["batch_stats"])
    return network, variables | updates, x * 3 - 1


def test_a_trained_network_takes_the_layer():
    network, variables, x = trained()
    plain = network.apply(variables, x, False)
    np.testing.assert_array_equal(adapted(math.inf).apply(variables, x, False), plain)
    in_training, _ = network.apply(variables, x, True, mutable=["batch_stats"])
    y, _ = adapted(4.0).apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, in_training)
    y, same = adapted(0.0).apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, in_training, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, {k: variables[k] for k in same})
    z = x
    for i in range(2):
        stats, params = variables["batch_stats"][f"bn_{i}"], variables["params"]
        z = z @ params[f"Dense_{i}"]["kernel"]
        ones = np.ones(6), np.zeros(6)
        z = expected(z, *ones, bnjax.BatchStats(**stats), 4.0)[0].clip(0)
    y = adapted(4.0).apply(variables, x, False)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_initializes():
    layer = AdaptiveBatchNorm(source_weight=1.0, use_running_average=True)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 4)))
    plain = bnjax.linen.BatchNorm(use_running_average=True)
    wanted = plain.init(jax.random.key(0), jnp.zeros((1, 4)))
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_nnx_layer(weight):
    x, _, _, source = data(dtype="float32")
    layer = NnxAdaptiveBatchNorm(5, source_weight=weight, rngs=nnx.Rngs(0))
    plain = bnjax.nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x), plain(x))
    np.testing.assert_array_equal(layer.mean[...], plain.mean[...])
    layer.mean[...], layer.var[...] = source.mean, source.var
    layer.eval()
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    wanted = expected(x, np.ones(5), np.zeros(5), source, weight)[0]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.mean[...], source.mean)


def test_adabn_is_population_statistics_of_the_target():
    """One batch of all the target's examples, layer by layer: a blend of weight 0."""
    network, variables, x = trained()

    def call(variables, x):
        return network.apply(variables, x, True, mutable=["batch_stats"])

    stats = recompute_batch_stats(call, variables, [x], method="pooled")
    m = len(x)
    wanted, params = x, variables["params"]
    for i in range(2):
        z = wanted @ params[f"Dense_{i}"]["kernel"]
        np.testing.assert_allclose(stats[f"bn_{i}"]["mean"], z.mean(0), rtol=1e-4)
        var = z.var(0) * m / (m - 1)  # the population's is unbiased
        np.testing.assert_allclose(stats[f"bn_{i}"]["var"], var, rtol=1e-4)
        wanted = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)).clip(0)
    nearly = adapted(0.0).apply(variables, x, False)
    np.testing.assert_allclose(nearly, wanted, rtol=1e-4, atol=1e-5)
