"""What hurt users of other libraries, one test for each report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from tests import oracle

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(16, 3)) * 2 + 1)
ONES, ZEROS = np.ones(3, np.float32), np.zeros(3, np.float32)
KEY = jax.random.key(0)


def train(x, stats=None, **options):
    stats = stats or bnjax.BatchStats.init(x.shape[-1])
    return bnjax.batch_norm(x, None, None, stats, **options)


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
def test_variance_that_cancels(ratio):
    """E[x^2] - E[x]^2 loses every digit (flax#1491, burn#5607)."""
    x = np.float32(RNG.normal(size=(256, 4)) + ratio)
    exact = x.astype(np.float64).var(0)
    _, stats = train(x, momentum=0.0, unbiased=False)
    np.testing.assert_allclose(stats.var, exact, rtol=1e-5)
    layer = bnjax.linen.BatchNorm(False, momentum=0.0, use_fast_variance=True)
    variables = layer.init(KEY, x)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["var"], exact, rtol=1e-5)
    np.testing.assert_allclose(y, oracle.forward(x, np.ones(4), np.zeros(4)), atol=1e-4)


@pytest.mark.parametrize("value", [0.1, 333.3, 16777217.0, 1e18])
def test_variance_that_is_negative(value):
    """A constant channel has variance 0, not below (tensorflow#118701)."""
    x = np.full((100, 2), value, np.float32)
    y, stats = train(x, momentum=0.0)
    np.testing.assert_array_equal(stats.var, np.zeros(2))
    np.testing.assert_array_equal(stats.mean, x[0])
    np.testing.assert_array_equal(y, np.zeros((100, 2)))


def test_one_element_makes_the_running_variance_nan():
    """m / (m - 1) of one value is 1 / 0 (tensorflow#46205, pytorch#4534)."""
    with pytest.raises(ValueError, match=r"one value per channel.*\(1, 3\)"):
        train(X[:1])
    with pytest.raises(ValueError, match=r"one value per channel.*\(1, 1, 1, 3\)"):
        train(X[:1, None, None])
    mask = np.zeros((16, 1), bool)
    mask[5] = True
    y, stats = train(X, mask=mask)
    np.testing.assert_array_equal(stats.mean, ZEROS)
    np.testing.assert_array_equal(stats.var, ONES)
    assert np.isfinite(np.asarray(y)).all()


def test_one_element_on_each_device_is_a_batch():
    """Not refused where the devices share statistics (pytorch#4534)."""
    _, stats = jax.pmap(
        lambda x: train(x, momentum=0.0, axis_name="data"), axis_name="data"
    )(X[:8, None])
    np.testing.assert_allclose(stats.var[0], X[:8].var(0, ddof=1), rtol=1e-5)


def test_biased_running_variance():
    """The documents said unbiased, the layer kept the biased one (pytorch#22192)."""
    x = X[:4]
    layer = bnjax.nnx.BatchNorm(3, momentum=0.0, unbiased=True, rngs=nnx.Rngs(0))
    y = layer(x)
    np.testing.assert_allclose(layer.var[...], x.var(0, ddof=1), rtol=1e-5)
    # The output is normalized by the biased variance all the same.
    np.testing.assert_allclose(y, oracle.forward(x, ONES, ZEROS), atol=1e-5)


@pytest.mark.parametrize("mapping", ["pmap", "shard_map", "jit"])
def test_unbiased_by_the_count_of_one_device(mapping):
    """m is the number of values on all devices (pytorch#19902, #77427)."""

    def run(x, axis_name="data"):
        return train(x, momentum=0.0, axis_name=axis_name)[1].var

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
    if mapping == "pmap":
        var = jax.pmap(run, axis_name="data")(X.reshape(8, 2, 3))[3]
    elif mapping == "shard_map":
        specs = {"mesh": mesh, "in_specs": P("data"), "out_specs": P()}
        var = jax.jit(jax.shard_map(run, **specs))(rows)
    else:
        var = jax.jit(lambda x: run(x, None))(rows)
    np.testing.assert_allclose(var, X.var(0, ddof=1), rtol=1e-5)


def test_mean_of_means_of_unequal_shards():
    """Devices with different mask counts weigh differently (flax#2417, scenic#1243)."""
    x = X + np.repeat(np.float32(np.arange(8)), 2)[:, None] * 10
    mask = np.ones((16, 1), bool)
    mask[[1, 3, 4, 5, 15]] = False
    run = jax.pmap(
        lambda x, mask: train(
            x, mask=mask, momentum=0.0, unbiased=False, axis_name="data"
        ),
        axis_name="data",
    )
    y, stats = run(x.reshape(8, 2, 3), mask.reshape(8, 2, 1))
    live = x[mask[:, 0]]
    for device in range(8):
        np.testing.assert_allclose(stats.mean[device], live.mean(0), rtol=1e-5)
        np.testing.assert_allclose(stats.var[device], live.var(0), rtol=1e-5)
    wanted = oracle.forward(x, ONES, ZEROS, mask=mask)
    np.testing.assert_allclose(np.reshape(y, (16, 3)), wanted, atol=1e-5)


@pytest.mark.parametrize("mapping", ["pmap", "shard_map", "shard_map, unchecked"])
def test_gradients_of_scale_and_bias_reduced_twice(mapping):
    """Each device gives its own share; the training loop sums them (nnabla#1120)."""
    dy = np.float32(RNG.normal(size=X.shape))

    def gradients(x, dy, scale, bias):
        def loss(scale, bias):
            stats = bnjax.BatchStats.init(3)
            y, _ = bnjax.batch_norm(x, scale, bias, stats, axis_name="data")
            return jnp.sum(y * dy)

        return jax.grad(loss, (0, 1))(scale, bias)

    _, *wanted = oracle.backward(X, ONES, dy)
    scale, bias = jnp.ones(3), jnp.zeros(3)
    if mapping == "pmap":
        shards = X.reshape(8, 2, 3), dy.reshape(8, 2, 3)
        over = (0, 0, None, None)
        mapped = jax.pmap(gradients, axis_name="data", in_axes=over)
        got = [a.sum(0) for a in mapped(*shards, scale, bias)]
    else:
        checked = mapping == "shard_map"
        rows = P("data")
        mapped = jax.shard_map(
            gradients,
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(rows, rows, P(), P()),
            out_specs=P() if checked else rows,
            check_vma=checked,
        )
        got = [a.reshape(-1, 3).sum(0) for a in jax.jit(mapped)(X, dy, scale, bias)]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_axis_name_typo_is_ignored():
    """An axis that is not there is an error outside init (flax#2606)."""
    layer = bnjax.linen.BatchNorm(use_running_average=False, axis_name="bacth")
    variables = layer.init(KEY, X)
    for mapped, x in (
        (lambda run: jax.pmap(run, axis_name="batch"), X[None]),
        (lambda run: jax.vmap(run, axis_name="batch"), X[None]),
        (jax.jit, X),
    ):
        run = mapped(lambda x: layer.apply(variables, x, mutable=["batch_stats"]))
        with pytest.raises(NameError, match="axis_name='bacth' is not bound here"):
            run(x)
    with pytest.raises(NameError, match="axis_name='bacth' is not bound here"):
        bnjax.nnx.BatchNorm(3, axis_name="bacth", rngs=nnx.Rngs(0))(X)


class Nested(nn.Module):
    """One set of parameters and statistics under two axes of vmap."""

    axis_name: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        module = bnjax.linen.BatchNorm
        for name in self.axis_name[::-1]:
            module = nn.vmap(
                module,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
                axis_name=name,
            )
        return module(use_running_average=False, axis_name=self.axis_name)(x)


@pytest.mark.slow
def test_nested_vmap_of_linen():
    """vmap in vmap: statistics over both axes come out unmapped (flax#3319)."""
    x = X.reshape(2, 4, 2, 3)
    model = Nested(("outer", "inner"))
    variables = jax.jit(model.init)(KEY, x)

    @jax.jit
    def run(params, x):
        (y, updates), vjp = jax.vjp(
            lambda params, x: model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            ),
            params,
            x,
        )
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return y, updates, vjp((jnp.cos(x), zeros))

    with jax.checking_leaks():
        y, updates, (dparams, dx) = run(variables["params"], x)
    wanted = oracle.forward(x, ONES, ZEROS)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    old = bnjax.BatchStats.init(3)
    mean, var = oracle.running(old, x, unbiased=False)
    (stats,), (dparams,) = updates["batch_stats"].values(), dparams.values()
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    for got, want in zip(
        (dx, dparams["scale"], dparams["bias"]),
        oracle.backward(x, ONES, np.cos(x)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_vmap_of_nnx_leaves_tracers_behind():
    """Called twice under vmap, the second call met the first's tracers (flax#4760)."""
    axes = ("shards", "inner")
    model = bnjax.nnx.BatchNorm(3, momentum=0.5, axis_name=axes, rngs=nnx.Rngs(0))
    inner = nnx.vmap(lambda model, x: model(x), in_axes=(None, 1), axis_name="inner")
    run = nnx.vmap(inner, in_axes=(None, 0), axis_name="shards")
    stats = bnjax.BatchStats.init(3)
    for _ in range(2):
        y = run(model, X.reshape(4, 2, 2, 3))
        mean, var = oracle.running(stats, X, momentum=0.5, unbiased=False)
        stats = bnjax.BatchStats(mean, var)
        np.testing.assert_allclose(model.mean[...], mean, rtol=1e-5)
        np.testing.assert_allclose(model.var[...], var, rtol=1e-5)
    wanted = oracle.forward(X, ONES, ZEROS).reshape(4, 2, 2, 3).swapaxes(1, 2)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_mask_counts_along_the_wrong_axis():
    """The mask's own entries were counted, not what they cover (keras#20815)."""
    x = np.float32(RNG.normal(size=(4, 4, 6, 3)) + 3)
    keep = RNG.random((4, 4)) < 0.6
    mask = keep[:, :, None, None]
    found = bnjax.moments(x, mask=mask)
    np.testing.assert_array_equal(found.count, np.full(3, keep.sum() * 6))
    np.testing.assert_allclose(found.mean, x[keep].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.var, x[keep].var((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8), (8, 5, 8)])
def test_mask_of_examples_taken_for_one_of_channels(shape):
    """A mask that fits two ways is refused, never guessed (keras#20815)."""
    x = np.ones(shape, np.float32)
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    message = r"mask has shape \(8,\).*mask.reshape\(\(8, 1"
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, x, mask=np.ones(8, bool))
    with pytest.raises(ValueError, match=message):
        bnjax.nnx.BatchNorm(8, rngs=nnx.Rngs(0))(x, mask=np.ones(8, bool))
    with pytest.raises(ValueError, match=message):
        train(x, mask=np.ones(8, bool))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_in_half_precision(dtype):
    """60,000 values of 300 add up to more than float16 holds (pytorch#126525,
    haiku#396)."""
    x = jnp.where(jnp.arange(60_000)[:, None] % 2 == 0, 300.0, 200.0).astype(dtype)
    dy = jnp.where(x > 250, 2.0, 1.0).astype(dtype)

    def run(x, bias):
        stats = bnjax.BatchStats.init(1)
        return bnjax.batch_norm(x, None, bias, stats, momentum=0.0, unbiased=False)

    y, vjp, stats = jax.vjp(run, x, jnp.zeros(1), has_aux=True)
    dx, dbias = vjp(dy)
    assert y.dtype == dtype
    assert stats.mean.dtype == jnp.float32
    np.testing.assert_allclose(stats.mean, [250])
    np.testing.assert_allclose(stats.var, [2500])
    np.testing.assert_allclose(np.float32(y), np.sign(np.float32(x) - 250), rtol=1e-2)
    np.testing.assert_allclose(dbias, [90_000])
    np.testing.assert_allclose(np.float32(dx), np.zeros(x.shape), atol=1e-4)


def test_forgetting_mutable():
    """The message says what to write, and that works (flax#1489)."""
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    message = r"model\.apply\(variables, x, \.\.\., mutable=\['batch_stats'\]\)"
    with pytest.raises(bnjax.linen.ImmutableBatchStatsError, match=message):
        layer.apply(variables, X)
    _, updates = layer.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * X.mean(0), 1e-4)


def test_gradients_with_nan_behind_the_mask():
    """What a mask hides makes no gradient NaN (jax#26328)."""
    x = jnp.asarray(X).at[3].set(jnp.nan).at[7, 1].set(jnp.inf)
    mask = jnp.isfinite(x)

    def loss(layer, x):
        return jnp.sum(jnp.square(layer(x, mask=mask)), where=mask)

    layer = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    gradients = nnx.grad(loss)(layer, x)
    known = np.where(mask, x, 0)
    mean = known.sum(0) / mask.sum(0)
    var = np.where(mask, np.square(known - mean), 0).sum(0) / mask.sum(0)
    x_hat = np.where(mask, (known - mean) / np.sqrt(var + 1e-5), 0)
    wanted = {"scale": 2 * np.square(x_hat).sum(0), "bias": 2 * x_hat.sum(0)}
    for name, value in wanted.items():
        np.testing.assert_allclose(gradients[name][...], value, rtol=1e-4, atol=1e-4)
