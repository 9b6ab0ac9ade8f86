import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.population import recompute_batch_stats
from bnjax.variants.averages import (
    AveragedBatchNorm,
    AveragedStats,
    NnxAveragedBatchNorm,
    averaged_batch_norm,
    update_averaged_stats,
)
from tests import oracle

MOMENTA = [None, 1.0, 0.9, 0.5, 0.0]


def batches(count=100, shape=(7, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    start = np.linspace(3, -1, count).reshape(-1, 1, 1, 1)
    return rng.normal(size=(count, *shape)) * rng.uniform(1, 3, shape[-1]) + start


def expected(xs, momentum, masks=None, unbiased=True):
    """The weighted mean of the statistics of batches, the last weighing 1."""
    decay = 1.0 if momentum is None else momentum
    masks = [None] * len(xs) if masks is None else masks
    sums = [0.0, 0.0, 0.0]
    for x, mask in zip(xs, masks, strict=True):
        mean, var, count = (np.ravel(a) for a in oracle.moments(x, mask=mask))
        if unbiased:
            var = var * count / np.maximum(count - 1, 1)
        for i, value in enumerate((mean, var, np.ones_like(mean))):
            sums[i] = np.where(count > 1, decay * sums[i] + value, sums[i])
    mean, var, weight = sums
    return mean / weight, var / weight, weight


@functools.partial(jax.jit, static_argnames=("momentum", "unbiased"))
def train(xs, stats, momentum, unbiased=True, masks=None):
    """The stats after each of some batches."""

    def step(stats, inputs):
        x, mask = inputs
        _, stats = averaged_batch_norm(
            x, None, None, stats, momentum=momentum, unbiased=unbiased, mask=mask
        )
        return stats, stats

    return jax.lax.scan(step, stats, (xs, masks))[1]


def values(stats):
    return stats.batch_stats.mean, stats.batch_stats.var, stats.weight


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_averages_of_1_2_and_100_batches(momentum, unbiased, x64):
    xs = batches()
    start = AveragedStats.init(5, jnp.float64)
    found = train(xs, start, momentum, unbiased)
    for count in (1, 2, 100):
        wanted = expected(xs[:count], momentum, unbiased=unbiased)
        got = jax.tree.map(lambda leaf, at=count - 1: leaf[at], values(found))
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_debiased_is_the_moving_average_from_zero_over_its_weight(x64):
    """As Adam divides by 1 - momentum^t."""
    xs, momentum = batches(30), 0.9
    found = train(xs, AveragedStats.init(5, jnp.float64), momentum)
    zero = jnp.zeros(5)
    stats = bnjax.BatchStats(zero, zero)
    for t, x in enumerate(xs, start=1):
        _, stats = bnjax.batch_norm(x, None, None, stats, momentum=momentum)
        share = 1 - momentum**t
        at = jax.tree.map(lambda leaf, t=t: leaf[t - 1], found.batch_stats)
        np.testing.assert_allclose(at.mean, stats.mean / share, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(at.var, stats.var / share, rtol=1e-11)


@pytest.mark.slow
def test_equal_weights_are_pytorchs_without_momentum():
    torch = pytest.importorskip("torch")
    xs = batches(20).astype("float32")
    layer = torch.nn.BatchNorm1d(5, momentum=None)
    for x in xs:
        layer(torch.from_numpy(x.reshape(-1, 5)))
    found = train(xs, AveragedStats.init(5), None).batch_stats
    np.testing.assert_allclose(found.mean[-1], layer.running_mean, rtol=1e-5)
    np.testing.assert_allclose(found.var[-1], layer.running_var, rtol=1e-5)


def test_a_momentum_that_changes(x64):
    """Each batch weighs the product of the momenta since."""
    xs, momenta = batches(6), np.array([0.3, 0.9, 0.5, 0.99, 0.7, 0.8])
    stats = AveragedStats.init(5, jnp.float64)
    step = jax.jit(
        lambda stats, x, momentum: averaged_batch_norm(
            x, None, None, stats, momentum=momentum
        )[1]
    )
    for x, momentum in zip(xs, momenta, strict=True):
        stats = step(stats, x, momentum)
    weights = np.append(np.cumprod(momenta[:0:-1])[::-1], 1)
    means = xs.mean((1, 2))
    wanted = (weights[:, None] * means).sum(0) / weights.sum()
    np.testing.assert_allclose(stats.batch_stats.mean, wanted, rtol=1e-12)
    np.testing.assert_allclose(stats.weight, np.full(5, weights.sum()), rtol=1e-12)


def test_a_full_weight_is_the_plain_moving_average():
    xs, momentum = batches(10).astype("float32"), 0.9
    old = bnjax.BatchStats.init(5)
    weight = jnp.full(5, 1 / (1 - momentum), "float32")
    found = train(xs, AveragedStats(old, weight), momentum).batch_stats
    for x in xs:
        _, old = bnjax.batch_norm(x, None, None, old, momentum=momentum)
    np.testing.assert_allclose(found.mean[-1], old.mean, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(found.var[-1], old.var, rtol=2e-6)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_batch_that_a_mask_hides_has_no_weight(momentum, x64):
    xs = batches(9)
    masks = np.random.default_rng(1).random(xs.shape) < 0.5
    masks[0, ..., 1] = False  # nothing of a channel in the first batch
    masks[3] = False
    masks[4, ..., 2] = False
    masks[4, 0, 0, 2] = True  # one value, which has no spread
    xs[~masks] = np.nan
    start = AveragedStats.init(5, jnp.float64)
    found = train(xs, start, momentum, masks=masks)
    last = jax.tree.map(lambda leaf: leaf[-1], values(found))
    for a, b in zip(last, expected(xs, momentum, masks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    first = jax.tree.map(lambda leaf: leaf[0], values(found))
    np.testing.assert_array_equal([leaf[1] for leaf in first], [0, 1, 0])


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_batch_norms(training, x64):
    x, dy = batches(2)
    scale, bias = np.random.default_rng(2).normal(size=(2, 5))
    old = bnjax.BatchStats(jnp.full(5, 0.3), jnp.full(5, 2.0))
    options = {"use_running_average": not training, "activation": "tanh"}

    def loss(function, stats):
        def run(x, scale, bias):
            return jnp.sum(function(x, scale, bias, stats, **options)[0] * dy)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2)))(x, scale, bias)

    stats = AveragedStats(old, jnp.full(5, 3.0))
    for a, b in zip(
        jax.tree.leaves(loss(averaged_batch_norm, stats)),
        jax.tree.leaves(loss(bnjax.batch_norm, old)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_statistics_that_are_not_to_move():
    x, stats = batches(1)[0], AveragedStats.init(5)
    for options in ({"use_running_average": True}, {"update_stats": False}):
        _, new = averaged_batch_norm(x, None, None, stats, **options)
        assert new is stats


def test_a_mean_far_from_the_origin_is_exact_once_it_is_known():
    xs = (batches(5) + 1e4).astype("float32")
    found = train(xs, AveragedStats.init(5), None)
    mean, var, _ = expected(xs, None)
    np.testing.assert_allclose(found.batch_stats.mean[-1], mean, rtol=1e-6)
    np.testing.assert_allclose(found.batch_stats.var[-1], var, rtol=1e-4)


def test_half_precision_inputs_have_float32_statistics(strict):
    xs = jnp.asarray(batches(20), "bfloat16")
    found = train(xs, AveragedStats.init(5), None)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    mean, var, _ = expected(np.asarray(xs, "float64"), None)
    np.testing.assert_allclose(found.batch_stats.mean[-1], mean, rtol=1e-5)
    np.testing.assert_allclose(found.batch_stats.var[-1], var, rtol=1e-5)


def test_eight_devices_and_vmap():
    xs = batches(2, (24, 3, 5)).astype("float32")
    stats = AveragedStats.init(5)
    mean, var, weight = expected(xs, 0.5)

    def two(xs, **options):
        found = stats
        for x in xs:
            _, found = averaged_batch_norm(
                x, None, None, found, momentum=0.5, **options
            )
        return values(found)

    mesh = jax.make_mesh((8,), ("data",))
    spec = PartitionSpec(None, "data")
    sharded = jax.device_put(xs, NamedSharding(mesh, spec))
    shared = functools.partial(two, axis_name="data")
    by_shard = jax.shard_map(
        shared, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
    )
    stacked = xs.reshape(2, 8, 3, 3, 5)
    by_vmap = jax.vmap(shared, in_axes=1, out_axes=None, axis_name="data")
    for found in (
        jax.jit(two)(sharded),
        jax.jit(by_shard)(sharded),
        jax.jit(by_vmap)(stacked),
    ):
        np.testing.assert_allclose(found[0], mean, rtol=1e-5)
        np.testing.assert_allclose(found[1], var, rtol=1e-5)
        np.testing.assert_allclose(found[2], weight, rtol=1e-6)
    apart = jax.jit(jax.vmap(two, in_axes=1))(stacked)
    wanted = [expected(stacked[:, i], 0.5) for i in range(8)]
    for i, each in enumerate(zip(*wanted, strict=True)):
        np.testing.assert_allclose(apart[i], each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 1.5}, ValueError, "momentum=1.5"),
        ({"momentum": "0.9"}, TypeError, "momentum='0.9' is not a number"),
        ({"momentum": -0.1, "use_running_average": True}, ValueError, "momentum=-0.1"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        averaged_batch_norm(
            jnp.zeros((4, 5)), None, None, AveragedStats.init(5), **options
        )


def test_a_traced_flag_and_other_shapes_are_refused():
    stats, x = AveragedStats.init(5), jnp.zeros((4, 5))
    with pytest.raises(TypeError, match="update_stats is a traced value"):
        jax.jit(
            lambda flag: averaged_batch_norm(x, None, None, stats, update_stats=flag)
        )(True)
    found = bnjax.moments(x)
    with pytest.raises(ValueError, match="differ"):
        update_averaged_stats(AveragedStats.init(4), found)
    with pytest.raises(ValueError, match=r"weight has shape \(\); expected \(5,\)"):
        update_averaged_stats(AveragedStats(stats.batch_stats, jnp.zeros(())), found)


def layers(momentum):
    options = {"momentum": momentum, "unbiased": True}
    of_linen = AveragedBatchNorm(**options)
    return of_linen, NnxAveragedBatchNorm(5, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_layers_keep_the_average(momentum):
    xs = batches(3).astype("float32")
    linen, of_nnx = layers(momentum)
    variables = linen.init(jax.random.key(0), xs[0], False)
    assert set(variables["batch_stats"]) == {"mean", "var", "weight"}
    np.testing.assert_array_equal(variables["batch_stats"]["weight"], np.zeros(5))
    stats = AveragedStats.init(5)
    step = jax.jit(lambda v, x: linen.apply(v, x, False, mutable=["batch_stats"]))
    nnx_step = nnx.jit(lambda layer, x: layer(x))
    for x in xs:
        y, updates = step(variables, x)
        variables = variables | updates
        y_nnx = nnx_step(of_nnx, x)
        wanted, stats = averaged_batch_norm(x, None, None, stats, momentum=momentum)
        np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(y_nnx, wanted, rtol=1e-6, atol=1e-6)
    for name, value in zip(("mean", "var", "weight"), values(stats), strict=True):
        np.testing.assert_allclose(variables["batch_stats"][name], value, rtol=1e-6)
        np.testing.assert_allclose(getattr(of_nnx, name)[...], value, rtol=1e-6)

    wanted, _ = averaged_batch_norm(xs[0], None, None, stats, use_running_average=True)
    y = linen.apply(variables, xs[0], True)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)
    of_nnx.eval()
    np.testing.assert_allclose(of_nnx(xs[0]), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_nnx.weight[...], stats.weight, rtol=1e-6)


def test_variables_of_the_plain_layer_evaluate_and_start_anew():
    x = batches(1)[0].astype("float32")
    linen, _ = layers(None)
    plain = bnjax.linen.BatchNorm(use_running_average=True)
    variables = plain.init(jax.random.key(0), x)
    y = linen.apply(variables, x, True)
    np.testing.assert_array_equal(y, plain.apply(variables, x))
    _, updates = linen.apply(variables, x, False, mutable=["batch_stats"])
    mean, _, weight = expected([x], None)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_array_equal(updates["batch_stats"]["weight"], weight)


def test_a_gradient_through_the_nnx_layer():
    x = batches(1)[0].astype("float32")
    _, layer = layers(None)
    gradients = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 3)))(layer, x)
    xhat = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5)
    np.testing.assert_allclose(
        gradients["scale"][...], 3 * (xhat**3).sum((0, 1)), rtol=1e-4
    )
    np.testing.assert_array_equal(layer.weight[...], np.ones(5))


def test_population_statistics_of_such_layers():
    xs = batches(4).astype("float32")
    linen, _ = layers(0.9)
    variables = linen.init(jax.random.key(0), xs[0], False)

    def call(variables, x):
        return linen.apply(variables, x, False, mutable=["batch_stats"])

    new = recompute_batch_stats(call, variables, xs)
    mean, var, _ = expected(xs, None)
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], var, rtol=1e-5)
    np.testing.assert_array_equal(new["weight"], np.zeros(5))
