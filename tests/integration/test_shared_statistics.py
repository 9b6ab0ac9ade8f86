"""Statistics shared between devices: values, types, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
from tests.integration.shared import (
    DEVICES,
    assert_same,
    collectives,
    data,
    joined,
    shards,
    step,
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mapping", ["pmap", "vmap"])
def test_replicas(mapping, masked):
    x, scale, bias, dy, mask = data(masked)
    want = jax.jit(step)(x, scale, bias, dy, mask)
    over = (0, None, None, 0, 0 if masked else None)
    mapper = {"pmap": jax.pmap, "vmap": jax.vmap}[mapping]
    replicas = mapper(
        lambda *args: step(*args, axis_name="data"), axis_name="data", in_axes=over
    )
    args = shards(x), scale, bias, shards(dy), shards(mask)
    assert_same(joined(*replicas(*args)), want)
    if mapping == "pmap":
        moved = collectives(replicas.lower(*args).compile())
        assert len(moved) == 2
        # Where JAX does not track what varies, the origin goes along to be compared.
        assert max(moved) <= (3 + masked) * scale.size


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("checked", [False, True])
def test_shard_map(checked, masked):
    x, scale, bias, dy, mask = data(masked)
    want = jax.jit(step)(x, scale, bias, dy, mask)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    rows = P("data")
    # With the checks on, gradients of replicated parameters arrive summed.
    params = P() if checked else rows
    sharded = jax.jit(
        jax.shard_map(
            lambda *args: step(*args, axis_name="data"),
            mesh=mesh,
            in_specs=(rows, P(), P(), rows, rows if masked else P()),
            out_specs=(rows, P(), (rows, params, params)),
            check_vma=checked,
        )
    )
    args = x, scale, bias, dy, mask
    y, stats, (dx, dscale, dbias) = sharded(*args)
    if not checked:
        dscale, dbias = (a.reshape(DEVICES, -1).sum(0) for a in (dscale, dbias))
    assert_same((y, stats, (dx, dscale, dbias)), want)
    moved = collectives(sharded.lower(*args).compile())
    assert len(moved) == 2
    assert max(moved) <= (2 + masked + (not checked)) * scale.size


@pytest.mark.parametrize("devices", [2, 8])
def test_bytes_do_not_grow_with_devices(devices):
    x, scale, bias, dy, mask = data(masked=True)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows = P("data")
    sharded = jax.shard_map(
        lambda *args: step(*args, axis_name="data"),
        mesh=mesh,
        in_specs=(rows, P(), P(), rows, rows),
        out_specs=(rows, P(), (rows, P(), P())),
    )
    compiled = jax.jit(sharded).lower(x, scale, bias, dy, mask).compile()
    assert collectives(compiled) == [3 * 4, 2 * 4]


@pytest.mark.parametrize("hidden", [None, "one shard", "first of each", "all"])
def test_large_means_and_hidden_shards(hidden):
    rng = np.random.default_rng(4)
    x = np.float32(rng.normal(size=(32, 5, 5, 3)) + 1e6)
    x[8:12] += 3
    mask = np.ones((32, 1, 1, 1), bool)
    if hidden == "one shard":
        mask[4:8] = False
    elif hidden == "first of each":
        mask[::4] = False
    elif hidden == "all":
        mask[:] = False
    x[~mask[:, 0, 0, 0]] = np.nan
    replicas = jax.pmap(
        lambda x, mask: bnjax.batch_norm(
            x,
            jnp.ones(3),
            jnp.zeros(3),
            bnjax.BatchStats.init(3),
            mask=mask,
            axis_name="data",
            momentum=0.0,
            unbiased=False,
            use_fast_variance=False,
        ),
        axis_name="data",
    )
    y, stats = replicas(shards(x), shards(mask))
    assert np.isfinite(np.asarray(y)).all()
    if hidden == "all":
        np.testing.assert_array_equal(stats.mean, np.zeros((8, 3)))
        np.testing.assert_array_equal(stats.var, np.ones((8, 3)))
        return
    live = x[mask[:, 0, 0, 0]].astype(np.float64)
    mean, var = live.mean((0, 1, 2)), live.var((0, 1, 2))
    for device in range(DEVICES):
        np.testing.assert_allclose(stats.var[device], var, rtol=1e-5)
        np.testing.assert_allclose(stats.mean[device], mean, rtol=1e-7)
    wanted = (live - mean) / np.sqrt(var + 1e-5)
    got = np.asarray(y).reshape(x.shape)[mask[:, 0, 0, 0]]
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_an_outlier_on_one_device():
    rng = np.random.default_rng(5)
    x = np.float32(rng.normal(size=(256, 3)) + 1e3)
    x[32] += 1e4
    found = jax.pmap(lambda x: bnjax.moments(x, axis_name="data"), axis_name="data")(
        shards(x)
    )
    np.testing.assert_allclose(found.var[0], x.astype(np.float64).var(0), rtol=1e-2)


def test_unbiased_counts_the_values_of_all_devices():
    x, scale, bias, _, _ = data(masked=False)
    stats = jax.pmap(
        lambda x: bnjax.batch_norm(
            x,
            scale,
            bias,
            bnjax.BatchStats.init(4),
            axis_name="data",
            momentum=0.0,
            unbiased=True,
        )[1],
        axis_name="data",
    )(shards(x))
    wanted = x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(stats.var[0], wanted, rtol=1e-5)


def test_groups_of_devices():
    x, scale, bias, dy, _ = data(masked=False)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    replicas = jax.pmap(
        lambda x, dy: step(x, scale, bias, dy, None, "data", groups), axis_name="data"
    )
    y, stats, (dx, dscale, dbias) = replicas(shards(x), shards(dy))
    for half in (slice(0, 4), slice(4, 8)):
        rows = slice(half.start * 2, half.stop * 2)
        want = jax.jit(step)(x[rows], scale, bias, dy[rows], None)
        got = (
            np.asarray(y)[half].reshape(8, 3, 3, 4),
            jax.tree.map(lambda a, first=half.start: a[first], stats),
            (
                np.asarray(dx)[half].reshape(8, 3, 3, 4),
                dscale[half].sum(0),
                dbias[half].sum(0),
            ),
        )
        assert_same(got, want)


def test_several_axis_names():
    x, scale, bias, dy, _ = data(masked=False)
    want = jax.jit(step)(x, scale, bias, dy, None)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows = P(("a", "b"))
    sharded = jax.shard_map(
        lambda x, dy: step(x, scale, bias, dy, None, ("a", "b")),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=(rows, P(), (rows, P(), P())),
    )
    assert_same(jax.jit(sharded)(x, dy), want)


def test_shared_statistics_are_a_scan_carry_and_leave_replicated():
    x, scale, bias, _, _ = data(masked=False)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def run(x, stats):
        def body(stats, _):
            y, stats = bnjax.batch_norm(x, scale, bias, stats, axis_name="data")
            return stats, jnp.sum(y)

        return jax.lax.scan(body, stats, length=3)[0]

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    got = jax.jit(sharded)(x, bnjax.BatchStats.init(4))
    stats = bnjax.BatchStats.init(4)
    for _ in range(3):
        _, stats = bnjax.batch_norm(x, scale, bias, stats)
    assert_same(got, stats)


def test_per_device_statistics_without_an_axis_name():
    x, scale, bias, dy, _ = data(masked=False)
    y, _, _ = jax.pmap(lambda x, dy: step(x, scale, bias, dy, None))(
        shards(x), shards(dy)
    )
    want, _, _ = jax.jit(step)(x[:2], scale, bias, dy[:2], None)
    np.testing.assert_allclose(y[0], want, atol=1e-6)


def test_one_example_on_each_device():
    x = np.float32(np.random.default_rng(6).normal(size=(8, 3)))
    y, _ = jax.pmap(
        lambda x: bnjax.batch_norm(
            x, None, None, bnjax.BatchStats.init(3), axis_name="data"
        ),
        axis_name="data",
    )(shards(x))
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y)[:, 0], want, atol=1e-5)
