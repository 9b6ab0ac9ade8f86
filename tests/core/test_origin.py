"""The value that sums are taken about: which it is, and what it costs in digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax._moments import Reduction, _moments_reference
from tests import oracle

FEATURES = 5
RATIOS = [0.0, 1e2, 1e4, 1e6]
# As documented: the relative error of the variance about a known origin.
BOUND = 4e-7


def data(count, ratio, masked=False, seed=0):
    """Values around `ratio` standard deviations, some of them hidden by a mask."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=(count, FEATURES)) + ratio)
    scale, bias, dy = (
        np.float32(rng.normal(size=shape))
        for shape in ((FEATURES,), (FEATURES,), x.shape)
    )
    mask = None
    if masked == "first hidden":
        mask = np.arange(count)[:, None] > 0
    elif masked == "weights":
        mask = np.float32(rng.integers(0, 4, (count, 1)))
    return x, scale, bias, dy, mask


def step(x, scale, bias, dy, mask, mean, axis_name=None, **options):
    """Output, gradients and statistics of a layer whose running mean is `mean`."""

    def layer(x, scale, bias):
        return bnjax.batch_norm(
            x,
            scale,
            bias,
            bnjax.BatchStats(mean, jnp.ones_like(mean)),
            momentum=0.0,
            unbiased=False,
            mask=mask,
            axis_name=axis_name,
            **options,
        )

    y, vjp, stats = jax.vjp(layer, x, scale, bias, has_aux=True)
    return y, vjp(dy), stats


def assert_exact(found, x, scale, bias, dy, mask):
    y, gradients, stats = found
    mean, var, _ = oracle.moments(x, mask=mask)
    np.testing.assert_allclose(stats.var, var[0], rtol=1e-5)
    np.testing.assert_allclose(stats.mean, mean[0], rtol=1e-6, atol=1e-6)
    wanted = oracle.forward(x, scale, bias, mask=mask)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    exact = oracle.backward(x, scale, dy, mask=mask)
    for got, want in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("masked", [False, "first hidden", "weights"])
@pytest.mark.parametrize("count", [97, 128, 1000])
@pytest.mark.parametrize("ratio", RATIOS)
def test_exact_on_one_device(ratio, count, masked):
    x, scale, bias, dy, mask = data(count, ratio, masked)
    found = jax.jit(step)(x, scale, bias, dy, mask, jnp.zeros(FEATURES))
    assert_exact(found, x, scale, bias, dy, mask)


def test_exact_in_a_program_that_is_exported():
    arrays = data(97, 1e6)
    exported = jax.export.export(jax.jit(step))(*arrays, jnp.zeros(FEATURES))
    assert_exact(exported.call(*arrays, jnp.zeros(FEATURES)), *arrays)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_first_row_is_the_origin_where_it_costs_nothing(platform):
    """XLA for TPUs could not fuse the sums into what makes `x`."""
    x = jnp.ones((32, FEATURES))

    def run(x, mean):
        return bnjax.normalize_batch(x, origin=mean)[0]

    traced = jax.jit(run).trace(x, x[0])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    of_one_device = "stablehlo.slice" in text or "bnjax_moments" in text
    assert of_one_device == (platform != "tpu")


# The origin of a TPU, of arrays that XLA partitions and of shared statistics: here in
# arrays that XLA partitions among eight devices.
def partitioned(x, scale, bias, dy, mask, mean, **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    x, dy = jax.device_put((x, dy), rows)
    mask = None if mask is None else jax.device_put(mask, rows)
    run = jax.jit(lambda *args: step(*args, **options))
    return run(x, scale, bias, dy, mask, mean)


@pytest.mark.parametrize("masked", [False, "first hidden", "weights"])
@pytest.mark.parametrize("count", [104, 128, 1000])
@pytest.mark.parametrize("ratio", RATIOS)
def test_exact_about_a_running_mean_that_has_arrived(ratio, count, masked):
    x, scale, bias, dy, mask = data(count, ratio, masked)
    mean = jnp.float32(ratio + np.linspace(-1, 1, FEATURES))
    found = partitioned(x, scale, bias, dy, mask, mean)
    assert_exact(found, x, scale, bias, dy, mask)


@pytest.mark.parametrize("masked", [False, "first hidden", "weights"])
@pytest.mark.parametrize("count", [104, 128, 1000])
@pytest.mark.parametrize("ratio", RATIOS)
def test_exact_by_name(ratio, count, masked):
    arrays = data(count, ratio, masked)
    found = partitioned(*arrays, jnp.zeros(FEATURES), use_fast_variance=False)
    assert_exact(found, *arrays)


def test_the_common_origin_is_rounded_once():
    """A compiler may compute a quotient again, and differently, wherever it is used."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("data"), out_specs=P())
    def variance(x):
        return bnjax.moments(x, axis_name="data").var

    # The operation of each device is an equation of its own.
    assert str(jax.make_jaxpr(variance)(data(64, 1e6)[0])).count("reduce_prec") == 1


@pytest.mark.parametrize("mapping", ["pmap", "vmap"])
@pytest.mark.parametrize("masked", [False, "first hidden", "weights"])
def test_exact_by_name_on_three_devices(masked, mapping):
    devices = 3
    x, scale, bias, dy, mask = data(16 * devices, 1e6, masked)
    mean = jnp.zeros(FEATURES)
    mapper = {"pmap": jax.pmap, "vmap": lambda *a, **b: jax.jit(jax.vmap(*a, **b))}

    def run(x, dy, mask):
        return step(x, scale, bias, dy, mask, mean, "data", use_fast_variance=False)

    parts = [None if a is None else a.reshape(devices, 16, -1) for a in (x, dy, mask)]
    y, (dx, *params), stats = mapper[mapping](
        run, axis_name="data", in_axes=(0, 0, None if mask is None else 0)
    )(*parts)
    found = (
        np.reshape(y, x.shape),
        (np.reshape(dx, x.shape), *(param.sum(0) for param in params)),
        jax.tree.map(lambda leaf: leaf[1], stats),
    )
    assert_exact(found, x, scale, bias, dy, mask)


@pytest.mark.parametrize("run", ["partitioned", "shared", "reference"])
@pytest.mark.parametrize("distance", [0.0, 1.0, 10.0, 100.0, 1000.0])
def test_the_documented_bound(distance, run):
    x, scale, bias, dy, _ = data(1000, 1.0)
    mean = jnp.full(FEATURES, 1 + distance)
    if run == "partitioned":
        *_, stats = partitioned(x, scale, bias, dy, None, mean)
        var = stats.var
    elif run == "shared":
        shared = jax.vmap(
            lambda x, dy: step(x, scale, bias, dy, None, mean, "data")[2].var,
            axis_name="data",
        )
        var = shared(x.reshape(8, 125, -1), dy.reshape(8, 125, -1))[3]
    else:
        reference = jax.jit(_moments_reference, static_argnames=("reduction", "dtype"))
        _, _, var, _ = reference(
            x, None, mean, reduction=Reduction((0,)), dtype=jnp.float32.dtype
        )
    exact = x.astype(np.float64).var(0)
    limit = BOUND * (1 + distance**2 / exact) * exact
    assert (np.abs(np.asarray(var, np.float64) - exact) <= limit).all()
    if distance >= 100:  # what a second pass over the values would not lose
        assert (np.abs(np.asarray(var, np.float64) - exact) > 1e-5 * exact).any()


@pytest.mark.parametrize("mapping", [None, "pmap", "vmap"])
def test_a_variance_that_is_lost_leaves_outputs_small(mapping):
    x, scale, bias, dy, _ = data(1000, 1e5)
    mean = jnp.zeros(FEATURES)
    if mapping is None:
        y, _, stats = partitioned(x, scale, bias, dy, None, mean)
    else:
        y, _, stats = {"pmap": jax.pmap, "vmap": jax.vmap}[mapping](
            lambda x, dy: step(x, scale, bias, dy, None, mean, "data"),
            axis_name="data",
        )(x.reshape(8, 125, -1), dy.reshape(8, 125, -1))
    assert (np.asarray(stats.var) >= 1.1e-7 * 1e10).all()
    assert np.abs((np.asarray(y) - bias) / scale).max() < 5


@pytest.mark.parametrize("lost", [np.nan, np.inf])
@pytest.mark.parametrize("layout", ["partitioned", "shared"])
def test_a_running_mean_that_is_lost_does_not_spoil_the_output(layout, lost):
    x, scale, bias, dy, _ = data(64, 3.0)
    mean = jnp.zeros(FEATURES).at[2].set(lost)
    if layout == "partitioned":
        y, _, _ = partitioned(x, scale, bias, dy, None, mean)
    else:
        y, _, _ = jax.vmap(
            lambda x, dy: step(x, scale, bias, dy, None, mean, "data"),
            axis_name="data",
        )(x.reshape(8, 8, -1), dy.reshape(8, 8, -1))
    wanted = oracle.forward(x, scale, bias)
    np.testing.assert_allclose(np.reshape(y, x.shape), wanted, atol=1e-4)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("masked", [False, "first hidden", "weights"])
@pytest.mark.parametrize("mapping", ["pmap", "vmap", "shard_map"])
def test_shared_statistics_about_a_running_mean(mapping, masked, ratio):
    x, scale, bias, dy, mask = data(104, ratio, masked)
    mean = jnp.float32(ratio + np.linspace(-1, 1, FEATURES))

    def run(x, dy, mask):
        return step(x, scale, bias, dy, mask, mean, "data")

    if mapping == "shard_map":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows = P("data")
        y, (dx, *params), stats = jax.jit(
            jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(rows, rows, P() if mask is None else rows),
                out_specs=(rows, (rows, rows, rows), P()),
                check_vma=False,
            )
        )(x, dy, mask)
        params = [np.reshape(param, (8, -1)).sum(0) for param in params]
    else:
        parts = [
            None if a is None else a.reshape(8, 13, *a.shape[1:]) for a in (x, dy, mask)
        ]
        mapper = {"pmap": jax.pmap, "vmap": jax.vmap}[mapping]
        over = (0, 0, None if mask is None else 0)
        y, (dx, *params), stats = mapper(run, axis_name="data", in_axes=over)(*parts)
        params = [param.sum(0) for param in params]
        stats = jax.tree.map(lambda leaf: leaf[5], stats)
    y, dx = np.reshape(y, x.shape), np.reshape(dx, x.shape)
    assert_exact((y, (dx, *params), stats), x, scale, bias, dy, mask)


@pytest.mark.parametrize("mapping", ["pmap", "vmap"])
def test_devices_with_different_running_means_are_told(mapping):
    x, scale, bias, dy, _ = data(64, 3.0)
    mapper = {"pmap": jax.pmap, "vmap": jax.vmap}[mapping]

    def run(x, dy, mean):
        return step(x, scale, bias, dy, None, mean, "data")

    parts = x.reshape(8, 8, -1), dy.reshape(8, 8, -1)
    same = jnp.tile(jnp.linspace(0.1, 7, FEATURES), (8, 1))
    y, _, _ = mapper(run, axis_name="data")(*parts, same)
    np.testing.assert_allclose(
        np.reshape(y, x.shape), oracle.forward(x, scale, bias), atol=1e-4
    )
    y, _, stats = mapper(run, axis_name="data")(*parts, same.at[3, 1].add(0.5))
    assert np.isnan(np.asarray(y)[..., 1]).any()
    assert np.isnan(np.asarray(stats.mean)[:, 1]).any()
    assert np.isfinite(np.delete(y, 1, axis=-1)).all()


def test_devices_that_are_known_to_differ_take_two_collectives():
    x, scale, bias, dy, _ = data(64, 1e4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    means = jnp.asarray(np.random.default_rng(1).normal(size=(8 * FEATURES)) * 1e4)
    rows = P("data")
    y, _, stats = jax.jit(
        jax.shard_map(
            lambda x, dy, mean: step(x, scale, bias, dy, None, mean, "data"),
            mesh=mesh,
            in_specs=rows,
            out_specs=(rows, (rows, P(), P()), rows),
        )
    )(x, dy, means)
    np.testing.assert_allclose(y, oracle.forward(x, scale, bias), atol=1e-4)
    exact = x.astype(np.float64).var(0)
    np.testing.assert_allclose(stats.var.reshape(8, -1)[4], exact, rtol=1e-5)


def test_the_origin_of_normalize_batch():
    x, scale, bias, *_ = data(64, 1e4)

    def output(origin):
        run = jax.vmap(
            lambda x: bnjax.normalize_batch(
                x, scale, bias, origin=origin, axis_name="data"
            ),
            axis_name="data",
        )
        y, moments = run(x.reshape(8, 8, -1))
        return np.reshape(y, x.shape), moments

    y, moments = output(None)
    np.testing.assert_allclose(y, oracle.forward(x, scale, bias), atol=1e-4)
    np.testing.assert_array_equal(moments.count, np.full((8, FEATURES), 64))
    y, _ = output(jnp.full(FEATURES, 1e4))
    np.testing.assert_allclose(y, oracle.forward(x, scale, bias), atol=1e-4)
    far, _ = output(jnp.zeros(FEATURES))
    assert np.abs(far - y).max() > 0.1
