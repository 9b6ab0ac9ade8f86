import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.folding import fold_batch_norm
from bnjax.population import recompute_batch_stats
from bnjax.variants.renorm import (
    BatchRenorm,
    NnxBatchRenorm,
    RenormStats,
    batch_renorm,
    d_max_schedule,
    r_max_schedule,
)

EPSILON, MOMENTUM = 1e-3, 0.9


def oracle(x, scale, bias, dy, mean, var, r_max, d_max, w=1.0, unbiased=True):
    """Algorithm 1 of Ioffe (2017) and its gradients, as the paper writes them."""
    axes = tuple(range(x.ndim - 1))
    w = np.broadcast_to(w, x.shape).astype(float)
    m = w.sum(axes)
    mu = (w * x).sum(axes) / m
    batch_var = (w * (x - mu) ** 2).sum(axes) / m
    std, running = np.sqrt(batch_var + EPSILON), np.sqrt(var + EPSILON)
    r = np.clip(std / running, 1 / r_max, r_max)
    d = np.clip((mu - mean) / running, -d_max, d_max)
    xhat = (x - mu) / std * r + d
    dxhat = dy * scale
    dstd = (dxhat * (x - mu) * -r / std**2).sum(axes)
    dmu = (dxhat * -r / std).sum(axes)
    dx = dxhat * r / std + w * dstd * (x - mu) / (m * std) + w * dmu / m
    factor = m / (m - 1) if unbiased else 1.0
    return {
        "y": scale * xhat + bias,
        "dx": dx,
        "dscale": (dy * xhat).sum(axes),
        "dbias": dy.sum(axes),
        "mean": MOMENTUM * mean + (1 - MOMENTUM) * mu,
        "var": MOMENTUM * var + (1 - MOMENTUM) * factor * batch_var,
        "r": r,
        "d": d,
    }


def data(shape=(6, 3, 5), seed=0):
    """Input, cotangent, scale and bias; channels of unlike mean and spread."""
    rng = np.random.default_rng(seed)
    c = shape[-1]
    x = rng.normal(size=shape) * np.linspace(0.2, 4, c) + np.linspace(-3, 3, c)
    return x, rng.normal(size=shape), rng.normal(size=c) + 2, rng.normal(size=c)


def float32_stats(mean, var):
    return RenormStats(
        jnp.asarray(mean, "float32"), jnp.asarray(var, "float32"), jnp.int32(0)
    )


def step_of(**options):
    """A training step as one function: output, gradients and new statistics."""

    def step(x, dy, scale, bias, stats, mask=None):
        def loss(x, scale, bias):
            y, new = batch_renorm(x, scale, bias, stats, mask=mask, **options)
            return jnp.sum(y.astype(dy.dtype) * dy), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, grads, new

    return step


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_one_two_and_a_hundred_updates(masked, unbiased, x64):
    def r_max(step):
        return 1 + jnp.clip((step - 5) / 60, 0, 1)

    def d_max(step):
        return jnp.clip((step - 5) / 40, 0, 0.7)

    options = {"momentum": MOMENTUM, "epsilon": EPSILON, "unbiased": unbiased}
    step = jax.jit(step_of(r_max=r_max, d_max=d_max, **options))
    stats = RenormStats.init(5, jnp.float64)
    mean, var = np.zeros(5), np.ones(5)
    rng, clipped = np.random.default_rng(9), []
    for count in range(100):
        x, dy, scale, bias = data(seed=count)
        x = x * (1 + count / 50)
        w = rng.integers(0, 3, size=(6, 3, 1)) if masked else 1.0
        mask = jnp.asarray(w) if masked else None
        limits = float(r_max(stats.step)), float(d_max(stats.step))
        expected = oracle(x, scale, bias, dy, mean, var, *limits, w, unbiased)
        y, (dx, dscale, dbias), stats = step(x, dy, scale, bias, stats, mask)
        mean, var = expected["mean"], expected["var"]
        clipped += [expected["r"] == limits[0], np.abs(expected["d"]) == limits[1]]
        if count + 1 not in (1, 2, 7, 100):
            continue
        found = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}
        found |= {"mean": stats.mean, "var": stats.var}
        for name, value in found.items():
            np.testing.assert_allclose(
                value, expected[name], rtol=1e-8, atol=1e-8, err_msg=f"{name}, {count}"
            )
        assert stats.step == count + 1
    # Both sides of the limits were met.
    assert 0.05 < np.mean(clipped) < 0.95


def test_the_gradient_is_that_of_constant_r_and_d(x64):
    """By finite differences of the output with r and d where they are."""
    x, dy, scale, bias = data()
    stats = RenormStats(jnp.full(5, 0.5), jnp.full(5, 2.0), jnp.int32(0))
    options = {"r_max": 1.5, "d_max": 1.0, "epsilon": EPSILON}
    _, (dx, *_), _ = jax.jit(step_of(**options))(x, dy, scale, bias, stats)
    known = oracle(x, scale, bias, dy, np.full(5, 0.5), np.full(5, 2.0), 1.5, 1.0)
    direction, h = np.random.default_rng(3).normal(size=x.shape), 1e-6

    def along(t):
        moved = x + t * direction
        std = np.sqrt(moved.var((0, 1)) + EPSILON)
        xhat = (moved - moved.mean((0, 1))) / std * known["r"] + known["d"]
        return np.sum((scale * xhat + bias) * dy)

    slope = (along(h) - along(-h)) / (2 * h)
    np.testing.assert_allclose(np.sum(dx * direction), slope, rtol=1e-7)


def test_no_gradient_reaches_the_statistics_that_come_in(x64):
    x, dy, *_ = data()

    def loss(mean, var):
        stats = RenormStats(mean, var, jnp.int32(0))
        return jnp.sum(batch_renorm(x, None, None, stats, r_max=9.0, d_max=9.0)[0] * dy)

    for gradient in jax.grad(loss, (0, 1))(jnp.zeros(5), jnp.ones(5)):
        np.testing.assert_array_equal(gradient, 0)


def test_unclipped_the_output_is_that_of_inference(x64):
    x, _, scale, bias = data()
    stats = RenormStats(jnp.full(5, 0.5), jnp.full(5, 2.0), jnp.int32(3))
    y, _ = batch_renorm(x, scale, bias, stats, r_max=1e9, d_max=1e9)
    inferred, same = batch_renorm(x, scale, bias, stats, use_running_average=True)
    np.testing.assert_allclose(y, inferred, rtol=1e-10, atol=1e-10)
    plain, _ = bnjax.batch_norm(x, scale, bias, stats, use_running_average=True)
    np.testing.assert_array_equal(inferred, plain)
    assert same is stats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_room_it_is_the_plain_layer(dtype):
    """With an activation, a residual and a mask: y, gradients and statistics."""
    x, dy, scale, bias = (jnp.asarray(a, dtype) for a in data())
    scale, bias = scale.astype("float32"), bias.astype("float32")
    residual = jnp.asarray(data(seed=5)[0], dtype)
    old = bnjax.BatchStats(jnp.full(5, 0.5), jnp.full(5, 2.0))
    options = {"mask": jnp.arange(6).reshape(6, 1, 1) < 5, "activation": "gelu"}

    def run(function, stats):
        def loss(x, scale, bias, residual):
            given = x, scale, bias, stats
            y, new = function(*given, residual=residual, **options)
            return jnp.sum((y * dy).astype("float32")), (y, new)

        grads = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
        return jax.jit(grads)(x, scale, bias, residual)

    grads, (y, new) = run(
        lambda *given, **rest: batch_renorm(*given, r_max=1.0, d_max=0.0, **rest),
        RenormStats(old.mean, old.var, jnp.int32(0)),
    )
    plain_grads, (plain_y, plain_new) = run(bnjax.batch_norm, old)
    assert y.dtype == plain_y.dtype == dtype
    # One rounding of the output; sums of a few dozen products.
    eps = float(jnp.finfo(dtype).eps)
    for pair in zip((y, *grads), (plain_y, *plain_grads), strict=True):
        found, expected = (np.asarray(value, float) for value in pair)
        limit = 8 * max(eps, 4e-7) * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=2 * eps, atol=limit)
    np.testing.assert_array_equal(new.mean, plain_new.mean)
    np.testing.assert_array_equal(new.var, plain_new.var)


def test_half_precision_is_rounded_once():
    x, dy, scale, bias = data()
    x = np.asarray(jnp.asarray(x + 30, jnp.bfloat16), float)
    mean, var = np.full(5, 30.0), np.full(5, 2.0)
    expected = oracle(x, scale, bias, dy, mean, var, 1.5, 1.0)["y"]
    stats = float32_stats(mean, var)
    given = (jnp.asarray(a, "float32") for a in (scale, bias))
    y, new = batch_renorm(
        jnp.asarray(x, "bfloat16"), *given, stats, r_max=1.5, d_max=1.0, epsilon=EPSILON
    )
    assert (y.dtype, new.mean.dtype, new.step.dtype) == ("bfloat16", "float32", "int32")
    np.testing.assert_allclose(np.asarray(y, float), expected, rtol=2**-8, atol=1e-5)


def test_large_means_keep_their_digits():
    x, dy, scale, bias = data()
    x = np.asarray(x + 1e4, "float32")
    mean, var = np.full(5, 1e4), np.full(5, 2.0)
    expected = oracle(x.astype(float), scale, bias, dy, mean, var, 1.5, 1.0)
    stats = float32_stats(mean, var)
    given = (jnp.asarray(a, "float32") for a in (x, dy, scale, bias))
    step = jax.jit(step_of(r_max=1.5, d_max=1.0, epsilon=EPSILON))
    y, (dx, *_), _ = step(*given, stats)
    # Both means are rounded, in the statistics and so in d.
    rounding = 2 * np.finfo("float32").eps * 1e4 / np.sqrt(2)
    limit = rounding * np.abs(scale).max()
    np.testing.assert_allclose(y, expected["y"], rtol=1e-5, atol=limit)
    np.testing.assert_allclose(dx, expected["dx"], rtol=1e-5, atol=1e-5)


def test_what_a_mask_hides_may_be_nan(x64):
    x, dy, scale, bias = data()
    mask = np.arange(6).reshape(6, 1, 1) != 2
    stats = RenormStats(jnp.full(5, 0.5), jnp.full(5, 2.0), jnp.int32(0))
    step = jax.jit(step_of(r_max=1.5, d_max=1.0))
    hidden = np.where(mask, x, np.nan)
    y, (dx, *rest), new = step(hidden, dy * mask, scale, bias, stats, mask)
    expected, (dx_of, *rest_of), new_of = step(x, dy * mask, scale, bias, stats, mask)
    where = np.broadcast_to(mask, x.shape)
    np.testing.assert_allclose(y[where], expected[where], rtol=1e-12)
    np.testing.assert_allclose(dx[where], dx_of[where], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(dx[~where], 0)
    jax.tree.map(np.testing.assert_array_equal, (rest, new), (rest_of, new_of))


@pytest.mark.slow
def test_vmap_over_models_and_other_feature_axes(x64):
    both = [data(seed=seed) for seed in (0, 1)]
    means, steps = jnp.array([[0.5] * 5, [-0.5] * 5]), jnp.array([0, 30_000], "int32")
    stacked = RenormStats(means, jnp.full((2, 5), 2.0), steps)
    step = jax.jit(step_of())
    arrays = [jnp.stack(pair) for pair in zip(*both, strict=True)]
    found = jax.jit(jax.vmap(step_of()))(*arrays, stacked)
    for i, given in enumerate(both):
        expected = step(*given, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        own = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            own,
            expected,
        )
    x, _, scale, bias = both[1]
    stats = RenormStats(means[1], jnp.full(5, 2.0), steps[1])
    turned, new = batch_renorm(x.transpose(2, 0, 1), scale, bias, stats, axis=0)
    np.testing.assert_allclose(turned.transpose(1, 2, 0), found[0][1], rtol=1e-10)
    np.testing.assert_allclose(new.var, found[2].var[1], rtol=1e-12)


def test_eight_devices_are_one_batch():
    """By jit over a mesh and by shard_map; as many collectives as the plain layer."""
    given = [jnp.asarray(a, "float32") for a in data((24, 5))]
    stats = float32_stats(np.linspace(-3, 3, 5) + 0.4, np.full(5, 2.0))
    limits = {"r_max": 1.5, "d_max": 0.2}
    expected = jax.jit(step_of(**limits))(*given, stats)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    specs = (P("data"), P("data"), P(), P(), P())
    out = P("data"), (P("data"), P(), P()), P()
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    placed = jax.device_put((*given, stats), tuple(shardings))
    by_jit = jax.jit(step_of(**limits))(*placed)

    def compiled(function):
        shared = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
        return jax.jit(shared).lower(*placed).compile()

    ours = compiled(step_of(axis_name="data", **limits))
    for found in (by_jit, ours(*placed)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            found,
            expected,
        )

    def plain(x, dy, scale, bias, stats):
        def loss(x, scale, bias):
            old = bnjax.BatchStats(stats.mean, stats.var)
            y, new = bnjax.batch_norm(x, scale, bias, old, axis_name="data")
            return jnp.sum(y * dy), (y, RenormStats(new.mean, new.var, stats.step))

        grads, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, grads, new

    def collectives(program):
        return len(re.findall(r" all-reduce(?:-start)?\(", program.as_text()))

    assert collectives(ours) <= collectives(compiled(plain))


def test_the_warm_up_is_the_plain_layer():
    x, _, scale, bias = (jnp.asarray(a, "float32") for a in data())
    stats = RenormStats(jnp.full(5, 0.5), jnp.full(5, 2.0), jnp.int32(0))
    options = {"r_max": 3.0, "d_max": 5.0}
    old = bnjax.BatchStats(stats.mean, stats.var)
    plain, _ = bnjax.batch_norm(x, scale, bias, old)
    full, _ = batch_renorm(x, scale, bias, stats, **options)
    assert np.abs(plain - full).max() > 0.5
    for step, expected in ((0, plain), (9, plain), (10, full), (11, full)):
        at = RenormStats(stats.mean, stats.var, jnp.int32(step))
        y, new = batch_renorm(x, scale, bias, at, warmup_steps=10, **options)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert new.step == step + 1


def test_the_schedules_of_the_paper():
    steps = jnp.array([0, 4_999, 5_000, 15_000, 22_500, 25_000, 40_000, 10**6])
    ramp = np.interp(steps, [5_000, 40_000], [1, 3])
    np.testing.assert_allclose(r_max_schedule(steps), ramp, rtol=1e-6)
    ramp = np.interp(steps, [5_000, 25_000], [0, 5])
    np.testing.assert_allclose(d_max_schedule(steps), ramp, rtol=1e-6)


def test_update_stats_false_changes_the_output_alone(strict):
    x, _, scale, bias = (jnp.asarray(a, "float32") for a in data())
    stats = RenormStats.init(5)
    y, same = batch_renorm(x, scale, bias, stats, update_stats=False)
    expected, new = batch_renorm(x, scale, bias, stats)
    np.testing.assert_array_equal(y, expected)
    assert same is stats
    assert new.step == 1


def test_the_layers_are_the_function():
    given = [jnp.asarray(data(seed=seed)[0], "float32") for seed in range(4)]
    limits = {"r_max": optax.linear_schedule(1.0, 3.0, 2), "d_max": 0.5}
    options = {"momentum": MOMENTUM, "unbiased": True, **limits}
    layer = BatchRenorm(activation="tanh", **options)
    variables = layer.init(jax.random.key(0), given[0], use_running_average=False)
    nnx_layer = NnxBatchRenorm(5, activation="tanh", rngs=nnx.Rngs(0), **options)
    stats = RenormStats.init(5)
    assert jax.tree.map(jnp.shape, variables["batch_stats"]) == {
        "mean": (5,),
        "step": (),
        "var": (5,),
    }
    train = jax.jit(
        lambda variables, x: layer.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )
    )
    nnx_train = nnx.jit(lambda layer, x: layer(x))
    one, zero = jnp.ones(5), jnp.zeros(5)
    for x in given:
        expected, stats = batch_renorm(
            x, one, zero, stats, activation="tanh", **options
        )
        y, updates = train(variables, x)
        variables |= updates
        nnx_y = nnx_train(nnx_layer, x)
        for value in (y, nnx_y):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    kept = variables["batch_stats"]
    own = {name: getattr(nnx_layer, name)[...] for name in kept}
    for found in (kept, own):
        assert found["step"] == 4
        np.testing.assert_allclose(found["mean"], stats.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["var"], stats.var, rtol=1e-5)

    expected, _ = batch_renorm(
        x, one, zero, stats, use_running_average=True, activation="tanh"
    )
    nnx_layer.eval()
    y = layer.apply(variables, x, use_running_average=True)
    for value in (y, nnx_layer(x)):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert nnx_layer.step[...] == 4


def test_population_statistics_and_folding_of_a_network():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = BatchRenorm(use_running_average=not train, name="norm")(nn.Dense(4)(x))
            return nn.Dense(3)(x)

    batches = [jnp.asarray(data((8, 5), seed)[0], "float32") for seed in range(3)]
    variables = Network().init(jax.random.key(0), batches[0], train=True)
    new = recompute_batch_stats(
        lambda v, x: Network().apply(v, x, train=True, mutable=["batch_stats"]),
        variables,
        batches,
        method="pooled",
    )
    inputs = np.concatenate(batches).astype(float) @ np.asarray(
        variables["params"]["Dense_0"]["kernel"], float
    )
    np.testing.assert_allclose(new["norm"]["mean"], inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["norm"]["var"], inputs.var(0, ddof=1), rtol=1e-5)
    assert set(new["norm"]) == {"mean", "var", "step"}

    variables |= {"batch_stats": new}
    folded = fold_batch_norm(
        lambda v, x: Network().apply(v, x, train=False), variables, batches[0]
    )
    expected = Network().apply(variables, batches[0], train=False)
    np.testing.assert_allclose(folded(batches[0]), expected, rtol=1e-4, atol=1e-5)
    assert "norm" not in folded.params


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r_max": 0.5}, ValueError, "r_max=0.5; expected a number of at least 1"),
        ({"d_max": -1.0}, ValueError, "d_max=-1.0; expected a number of at least 0"),
        ({"r_max": lambda step: 0.0 * step}, ValueError, "r_max=0.0"),
        ({"d_max": "5"}, TypeError, "d_max='5' is not a number"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"epsilon": 0.0}, ValueError, "epsilon=0.0"),
        ({"momentum": 1.5}, ValueError, "momentum=1.5"),
        ({"activation": "rleu"}, ValueError, "Did you mean 'relu'"),
        ({"scale": jnp.ones(1)}, ValueError, r"scale has shape \(1,\)"),
        ({"x": jnp.ones((1, 5))}, ValueError, "one value per channel"),
        ({"x": jnp.ones((6, 5), "complex64")}, TypeError, "expected real numbers"),
        (
            {"x": jnp.ones((6, 4))},
            ValueError,
            r"mean has shape \(5,\); exp",
        ),
    ],
)
def test_what_is_refused(options, error, message):
    x, scale = options.pop("x", jnp.ones((6, 5))), options.pop("scale", None)
    with pytest.raises(error, match=message):
        batch_renorm(x, scale, None, RenormStats.init(5), **options)


def test_an_error_names_the_layer():
    layer = BatchRenorm(use_running_average=False, r_max=0.5)
    with pytest.raises(ValueError, match=r"BatchNorm layer \(top level\): r_max=0\.5"):
        layer.init(jax.random.key(0), jnp.ones((6, 5)))
