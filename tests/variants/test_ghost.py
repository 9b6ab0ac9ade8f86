import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax.functional import Moments
from bnjax.linen import BatchNorm
from bnjax.nnx import BatchNorm as NnxBatchNorm
from bnjax.variants.ghost import (
    GhostBatchNorm,
    NnxGhostBatchNorm,
    ghost_batch_norm,
    merge_stacked,
    normalize_groups,
)


def data(shape=(12, 3, 4), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2 + rng.normal(size=(shape[0], 1, 1))
    return (jnp.asarray(a) for a in (x, rng.normal(size=4), rng.normal(size=4)))


@pytest.mark.parametrize("size", [None, 4])
def test_a_batch_in_one_group_has_its_examples_first(size):
    x = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="makes the first axis of x a feature axis"):
        ghost_batch_norm(
            x, None, None, bnjax.BatchStats.init(4), axis=0, virtual_batch_size=size
        )


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
def test_each_group_is_a_batch_of_its_own(size, x64):
    x, scale, bias = data()
    old = bnjax.BatchStats(jnp.full(4, 0.5), jnp.full(4, 2.0))
    y, stats = ghost_batch_norm(
        x, scale, bias, old, virtual_batch_size=size, momentum=0.9, activation="tanh"
    )
    for start in range(0, 12, size):
        group = slice(start, start + size)
        expected, _ = bnjax.batch_norm(x[group], scale, bias, old, activation="tanh")
        np.testing.assert_allclose(y[group], expected, rtol=1e-12, atol=1e-12)
    values = np.asarray(x).reshape(-1, 4)
    np.testing.assert_allclose(stats.mean, 0.45 + 0.1 * values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, 1.8 + 0.1 * values.var(0, ddof=1), rtol=1e-12)


def test_gradients_are_those_of_the_groups(x64):
    x, scale, bias = data()
    dy = next(data(seed=1))
    stats = bnjax.BatchStats.init(4)

    def ghost(x, scale, bias):
        y, _ = ghost_batch_norm(x, scale, bias, stats, virtual_batch_size=4)
        return jnp.sum(y * dy)

    def groups(x, scale, bias):
        parts = [
            bnjax.batch_norm(x[i : i + 4], scale, bias, stats)[0] for i in (0, 4, 8)
        ]
        return jnp.sum(jnp.concatenate(parts) * dy)

    found = jax.jit(jax.grad(ghost, (0, 1, 2)))(x, scale, bias)
    expected = jax.grad(groups, (0, 1, 2))(x, scale, bias)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_the_count_is_that_of_one_device():
    """Where devices share a group, merging their moments counts each value once."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)), "float32")

    def run(x):
        options = {"virtual_batch_size": 6, "axis_name": "data"}
        return normalize_groups(x, None, None, **options)[1]

    found = jax.vmap(run, axis_name="data")(x)
    np.testing.assert_array_equal(found.count, np.full((2, 4), 12))
    merged = merge_stacked(found)
    np.testing.assert_array_equal(merged.count, np.full(4, 24))
    np.testing.assert_allclose(merged.var, x.reshape(24, 4).var(0), rtol=1e-5)


def test_other_feature_axes_and_a_residual(x64):
    x, scale, bias = data()
    residual = next(data(seed=2))
    stats = bnjax.BatchStats.init(4)
    options = {"virtual_batch_size": 3, "activation": "relu"}
    y, new = ghost_batch_norm(x, scale, bias, stats, residual=residual, **options)
    turned, turned_new = ghost_batch_norm(
        jnp.moveaxis(x, 2, 1),
        scale,
        bias,
        stats,
        axis=1,
        residual=jnp.moveaxis(residual, 2, 1),
        **options,
    )
    np.testing.assert_allclose(jnp.moveaxis(turned, 1, 2), y, rtol=1e-12)
    np.testing.assert_allclose(turned_new.var, new.var, rtol=1e-12)


def test_many_groups_are_one_program():
    def equations(groups):
        x = jnp.zeros((4 * groups, 5))
        stats = bnjax.BatchStats.init(5)

        def outputs(x):
            return ghost_batch_norm(x, None, None, stats, virtual_batch_size=4)[0]

        return str(jax.make_jaxpr(outputs)(x)).count("rsqrt")

    assert equations(2) == equations(16)


def test_merging_stacked_moments_is_exact():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 15, 3)) + 30).astype(np.float32)
    parts = [bnjax.moments(jnp.asarray(part)) for part in x]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    merged = merge_stacked(stacked)
    exact = x.astype(np.float64).reshape(60, 3)
    np.testing.assert_allclose(merged.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(merged.var, exact.var(0), rtol=1e-6)
    np.testing.assert_array_equal(merged.count, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_batch_size": 5}, "virtual_batch_size=5 for a batch of 12"),
        ({"virtual_batch_size": 0}, "virtual_batch_size=0"),
        ({"virtual_batch_size": 3, "axis": 0}, "first axis"),
    ],
)
def test_what_cannot_be_grouped_is_refused(options, message):
    x = jnp.zeros((12, 3, 4))
    stats = bnjax.BatchStats.init(12 if "axis" in options else 4)
    with pytest.raises(ValueError, match=message):
        ghost_batch_norm(x, None, None, stats, **options)


def test_one_value_per_channel_is_refused():
    x, stats = jnp.zeros((6, 4)), bnjax.BatchStats.init(4)
    with pytest.raises(ValueError, match="one value per channel"):
        ghost_batch_norm(x, None, None, stats, virtual_batch_size=1)


def test_the_layer_is_batch_norms_in_inference_and_at_init():
    x, _, _ = data()

    def run(layer):
        y, variables = layer.init_with_output(
            jax.random.key(0), x, use_running_average=True
        )
        return variables, y, layer.apply(variables, x, use_running_average=True)

    jax.tree.map(
        np.testing.assert_array_equal,
        run(GhostBatchNorm(virtual_batch_size=5, activation="relu")),
        run(BatchNorm(activation="relu")),
    )


def test_the_layer_updates_its_statistics_or_hands_over_the_moments(x64):
    x, _, _ = data()
    layer = GhostBatchNorm(
        use_running_average=False, virtual_batch_size=3, momentum=0.9, unbiased=True
    )
    variables = layer.init(jax.random.key(0), x)
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    old = bnjax.BatchStats.init(4)
    expected, stats = ghost_batch_norm(
        x, None, None, old, virtual_batch_size=3, momentum=0.9
    )
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(updated["batch_stats"]["var"], stats.var, rtol=1e-12)

    y, updated = layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
    jax.tree.map(
        np.testing.assert_array_equal,
        updated["batch_stats"],
        variables["batch_stats"],
    )
    moments = updated["batch_moments"]["moments"]
    assert isinstance(moments, Moments)
    values = np.asarray(x).reshape(-1, 4)
    np.testing.assert_allclose(moments.var, values.var(0), rtol=1e-12)
    np.testing.assert_array_equal(moments.count, 36)


def test_the_layer_may_leave_its_statistics(x64):
    x, _, _ = data()
    layer = GhostBatchNorm(use_running_average=False, virtual_batch_size=3)
    variables = layer.init(jax.random.key(0), x)
    wanted, _ = layer.apply(variables, x, mutable=["batch_stats"])
    mutable = ["batch_stats", "batch_moments"]
    for kept in (False, mutable):
        y = layer.apply(variables, x, update_stats=False, mutable=kept)
        y, new = y if kept else (y, {"batch_stats": variables["batch_stats"]})
        np.testing.assert_array_equal(y, wanted)
        jax.tree.map(
            np.testing.assert_array_equal,
            new,
            {"batch_stats": variables["batch_stats"]},
        )
    y, new = layer.apply(
        variables,
        x,
        use_running_average=None,
        update_stats=True,
        mutable=mutable,
    )
    assert set(new) == set(mutable)


@pytest.mark.parametrize("virtual_batch_size", [6, None])
@pytest.mark.parametrize("run", ["function", "linen", "nnx"])
def test_the_running_variance_counts_the_values_of_all_devices(run, virtual_batch_size):
    """Devices that share groups have m / (m - 1) of all their values."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)), "float32")
    options = {"virtual_batch_size": virtual_batch_size, "axis_name": "data"}
    options |= {"momentum": 0.0, "unbiased": True}

    def new_stats(x):
        if run == "function":
            stats = bnjax.BatchStats.init(4)
            return ghost_batch_norm(x, None, None, stats, **options)[1].var
        if run == "nnx":
            layer = NnxGhostBatchNorm(4, **options, rngs=nnx.Rngs(0))
            layer(x)
            return layer.var[...]
        layer = GhostBatchNorm(use_running_average=False, **options)
        variables = layer.init(jax.random.key(0), x)
        _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return updates["batch_stats"]["var"]

    found = jax.vmap(new_stats, axis_name="data")(x)
    wanted = np.var(x.reshape(24, 4), axis=0, ddof=1)
    np.testing.assert_allclose(found, np.stack([wanted, wanted]), rtol=1e-5)


def test_a_mask_is_refused():
    stats, mask = bnjax.BatchStats.init(3), jnp.ones((6, 1), bool)
    with pytest.raises(ValueError, match="a mask was given"):
        ghost_batch_norm(
            jnp.ones((6, 3)), None, None, stats, virtual_batch_size=None, mask=mask
        )
    x = jnp.zeros((6, 4))
    layer = GhostBatchNorm(use_running_average=False, virtual_batch_size=3)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="a mask was given"):
        layer.apply(variables, x, mask=jnp.ones((6, 1), bool), mutable=["batch_stats"])
    with pytest.raises(ValueError, match="layer of 4 features: a mask was given"):
        nnx_layer(3)(x, mask=jnp.ones((6, 1), bool))


def nnx_layer(size, **options):
    options = {"momentum": 0.9, "unbiased": True, **options}
    return NnxGhostBatchNorm(4, virtual_batch_size=size, rngs=nnx.Rngs(0), **options)


def test_the_layer_of_nnx_is_the_function(x64):
    x, scale, bias = data()
    layer = nnx_layer(3, activation="tanh")
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
    step = nnx.jit(lambda layer, x: layer(x))
    stats = bnjax.BatchStats.init(4)
    options = {"virtual_batch_size": 3, "momentum": 0.9, "activation": "tanh"}
    for count in range(1, 101):
        y = step(layer, x)
        if count < 3:
            want, stats = ghost_batch_norm(x, scale, bias, stats, **options)
            np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)
            # The layer keeps float32.
            np.testing.assert_allclose(layer.mean[...], stats.mean, rtol=1e-6)
            np.testing.assert_allclose(layer.var[...], stats.var, rtol=1e-6)
    values, kept = np.asarray(x).reshape(-1, 4), 0.9**100
    var = kept + (1 - kept) * values.var(0, ddof=1)
    np.testing.assert_allclose(layer.mean[...], (1 - kept) * values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], var, rtol=1e-5)

    layer.eval()
    plain = NnxBatchNorm(4, activation="tanh", rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer))
    plain.eval()
    np.testing.assert_array_equal(layer(x), plain(x))
