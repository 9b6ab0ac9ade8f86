import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.variants.whitening import (
    WhiteningStats,
    whiten_batch,
)
from tests.integration.shared import collectives
from tests.variants.whitening_oracle import (
    MOMENTUM,
    SIZE,
    close,
    data,
    moments,
    train,
    whitened,
)


def shared(mapping, use_fast_variance=True):
    """A step whose statistics eight devices share."""
    options = (("axis_name", "data"), ("use_fast_variance", use_fast_variance))
    step = functools.partial(train, iterations=5, options=options)
    if mapping == "vmap":
        return jax.vmap(step, (0, None, None, None, 0, 0), axis_name="data")
    if mapping == "pmap":
        return jax.pmap(step, "data", in_axes=(0, None, None, None, 0, 0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, checked = P("data"), mapping == "checked"

    def one(x, scale, bias, stats, dy, mask):
        x, dy, mask = x[0], dy[0], mask[0]
        y, new, (dx, *dparams) = step(x, scale, bias, stats, dy, mask)
        if not checked:
            new, dparams = jax.tree.map(lambda leaf: leaf[None], (new, dparams))
        return y[None], new, (dx[None], *dparams)

    out = P() if checked else rows
    return jax.jit(
        jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(rows, P(), P(), P(), rows, rows),
            out_specs=(rows, out, (rows, out, out)),
            check_vma=checked,
        )
    )


@pytest.mark.parametrize(
    "mapping",
    [pytest.param("pmap", marks=pytest.mark.slow), "checked", "unchecked"],
)
def test_devices_share_in_one_collective(mapping):
    x, scale, bias, dy = data(shape=(16, 5, 6), dtype="float32")
    x = x + jnp.arange(16.0).reshape(16, 1, 1) // 2
    mask = (jnp.arange(16) % 5 != 1).reshape(16, 1, 1)
    mask = mask.at[:2].set(False)
    x = x.at[0].set(jnp.nan)
    dy = dy.at[0].set(0)
    stats = WhiteningStats(jnp.full(6, 4.0), WhiteningStats.init(6, SIZE).cov)
    want = train(x, scale, bias, stats, dy, mask, iterations=5)

    def parts(array):
        return array.reshape(8, 2, *array.shape[1:])

    run = shared(mapping)
    arguments = parts(x), scale, bias, stats, parts(dy), parts(mask)
    y, new, (dx, *dparams) = run(*arguments)
    if mapping != "checked":
        for leaf in jax.tree.leaves(new):
            np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[0], leaf.shape))
        new = jax.tree.map(lambda leaf: leaf[0], new)
        dparams = [jnp.sum(leaf, 0) for leaf in dparams]
    got = y.reshape(x.shape), new, (dx.reshape(x.shape), *dparams)
    close(got, want, rtol=2e-4, atol=1e-4)
    # Covariance, mean, count and origin; and the gradients of the first two.
    moved = collectives(run.lower(*arguments).compile())
    assert len(moved) == 2
    assert max(moved) <= 6 * (SIZE + 3)


def test_devices_that_agree_on_an_origin_lose_no_digits():
    x, scale, bias, dy = data(shape=(16, 5, 6), dtype="float32")
    x = x + 1e5
    stats = WhiteningStats.init(6, SIZE)
    parts = [leaf.reshape(8, 2, *leaf.shape[1:]) for leaf in (x, dy)]
    mask = jnp.ones((8, 1, 1, 1), bool)
    run = shared("vmap", use_fast_variance=False)
    y, new, _ = run(parts[0], scale, bias, stats, parts[1], mask)
    mean, cov, count = moments(x)
    expected = MOMENTUM * np.asarray(stats.cov) + 0.1 * cov * count / (count - 1)
    np.testing.assert_allclose(new.cov[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        y.reshape(x.shape), whitened(x, mean, cov, 5, scale, bias), 1e-3, 1e-3
    )


@pytest.mark.slow
def test_one_example_a_device():
    x, *_ = data(shape=(8, 6), dtype="float32")

    def run(x, **options):
        return whiten_batch(x, group_size=SIZE, **options)

    y, found = jax.vmap(lambda x: run(x, axis_name="data"), axis_name="data")(x)
    expected, batch = run(x)
    close(y, expected, rtol=1e-4, atol=1e-4)
    close(jax.tree.map(lambda leaf: leaf[0], found), batch, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_devices_with_other_running_means_are_told_by_nan():
    x, *_ = data(shape=(8, 5, 6), dtype="float32")

    def run(x, origin):
        return whiten_batch(x, group_size=SIZE, origin=origin, axis_name="data")[1].mean

    origins = jnp.zeros((8, 6)).at[3, 2].set(0.5)
    mean = jax.vmap(run, axis_name="data")(x, origins)
    assert np.isnan(mean[:, 2]).all()
    assert np.isfinite(jnp.delete(mean, 2, 1)).all()
    lost = jax.vmap(run, axis_name="data")(x, jnp.full((8, 6), jnp.inf))
    close(lost[0], x.reshape(-1, 6).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [(AxisType.Auto, P("data", "model")), (AxisType.Explicit, P("data"))],
)
def test_arrays_sharded_over_a_mesh(axis_type, spec):
    x, scale, bias, dy = data(shape=(8, 4, 6), dtype="float32")
    stats = WhiteningStats.init(6, SIZE)
    want = train(x, scale, bias, stats, dy, iterations=None)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)

    def put(tree, spec=None):
        return jax.device_put(tree, NamedSharding(mesh, spec or P()))

    got = train(
        put(x, spec), put(scale), put(bias), put(stats), put(dy, spec), iterations=None
    )
    close(got, want, rtol=1e-4, atol=1e-4)
