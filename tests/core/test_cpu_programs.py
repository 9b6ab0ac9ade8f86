"""Which programs call the kernels, and that transformations come out right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from bnjax._cpu import build
from bnjax._derivative import MAPPED
from tests.core import needs_kernels

pytestmark = needs_kernels


def layer(activation=None, **options):
    def loss(x, scale, bias):
        stats = bnjax.BatchStats.init(scale.shape)
        options.setdefault("activation", activation)
        y, new = bnjax.batch_norm(x, scale, bias, stats, **options)
        return jnp.sum(y * y * y) + jnp.sum(new.var)

    return loss


def calls(function, *arguments):
    """How often a compiled program calls the kernels."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return text.count('custom_call_target="bnjax_')


ARRAYS = jnp.ones((16, 4, 4, 8)), jnp.ones(8), jnp.ones(8)


def test_which_programs_call_them():
    gradient = jax.grad(layer("relu"), (0, 1, 2))
    assert calls(gradient, *ARRAYS) == 3
    # Without an activation the output is XLA's, which fuses it with what follows,
    # but for arrays that are mapped again each time.
    assert calls(jax.grad(layer()), *ARRAYS) == 2
    large = jax.ShapeDtypeStruct((MAPPED // 32, 8), "float32")
    assert calls(jax.grad(layer()), large, *ARRAYS[1:]) == 3
    assert calls(layer("relu", use_running_average=True), *ARRAYS) == 0
    assert calls(layer("gelu"), *ARRAYS) == 1
    assert calls(jax.grad(layer(axis=1)), *(jnp.ones((8, 8, 8)), *ARRAYS[1:])) == 0
    mask = jnp.ones((16, 1, 1, 1), bool)
    assert calls(jax.grad(layer(mask=mask)), *ARRAYS) == 0
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, "float64") for array in ARRAYS]
        assert calls(jax.grad(layer("relu")), *wide) == 0


def test_a_program_that_xla_divides_calls_none():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(ARRAYS[0], NamedSharding(mesh, PartitionSpec("data")))
    assert calls(jax.grad(layer("relu")), x, *ARRAYS[1:]) == 0


def test_a_program_that_is_exported_calls_none():
    # Values that differ: with none the gradient is the rounding of a difference.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 4, 8)), "float32")
    arrays = x, *ARRAYS[1:]
    exported = jax.export.export(jax.jit(jax.grad(layer("relu"))))(*arrays)
    assert "bnjax_" not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize()).call(*arrays)
    expected = jax.grad(layer("relu"))(*arrays)
    assert float(jnp.abs(expected).max()) > 1
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5)


def test_each_device_of_a_shard_map_calls_them():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 8)), "float32")
    rows = PartitionSpec("data")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=rows, out_specs=rows)
    def own_moments(x):
        found = bnjax.moments(x)
        return jnp.stack([found.mean, found.var])[None]

    text = own_moments.lower(x).compile().as_text()
    assert text.count('custom_call_target="bnjax_') == 1
    parts = np.asarray(x, np.float64).reshape(8, -1, 8)
    wanted = np.stack([parts.mean(1), parts.var(1)], 1)
    np.testing.assert_allclose(own_moments(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_shard_map_over_some_of_the_axes_calls_none():
    """XLA divides the arrays over the others."""
    mesh = jax.make_mesh((2, 4), ("map", "xla"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), "float32")
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("map", "xla"))))
    rows = PartitionSpec("map")
    mapped = {"mesh": mesh, "in_specs": rows, "out_specs": rows}

    @jax.jit
    @jax.shard_map(axis_names={"map"}, **mapped)
    def own_moments(x):
        found = bnjax.moments(x)
        return jnp.stack([found.mean, found.var])[None]

    text = own_moments.lower(x).compile().as_text()
    assert text.count('custom_call_target="bnjax_') == 0
    parts = np.asarray(x, np.float64).reshape(2, -1, 8)
    wanted = np.stack([parts.mean(1), parts.var(1)], 1)
    np.testing.assert_allclose(own_moments(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_devices_with_own_statistics_and_a_shared_scale(outside, check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), "float32")
    scale, bias = jnp.linspace(0.5, 1.5, 8), jnp.linspace(-1, 1, 8)
    rows, all_alike = PartitionSpec("data"), PartitionSpec()
    loss = layer("relu")

    def of_parts(x, scale, bias):
        return sum(loss(part, scale, bias) for part in x.reshape(8, 8, 8))

    @jax.jit
    def of_devices(x, scale, bias):
        def local(x, scale, bias):
            if outside:
                return loss(x, scale, bias)[None]
            # The sum of the gradients is the user's, or the checks' of what varies.
            dx, *shared = jax.grad(loss, (0, 1, 2))(x, scale, bias)
            return dx, *(g if check_vma else jax.lax.psum(g, "data") for g in shared)

        across = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, all_alike, all_alike),
            out_specs=rows if outside else (rows, all_alike, all_alike),
            check_vma=check_vma,
        )
        if not outside:
            return across(x, scale, bias)
        return jax.grad(lambda *a: across(*a).sum(), (0, 1, 2))(x, scale, bias)

    found = of_devices(x, scale, bias)
    wanted = jax.grad(of_parts, (0, 1, 2))(x, scale, bias)
    for value, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-4)


def test_off(monkeypatch):
    monkeypatch.setenv(build.CHOICE, "off")
    jax.clear_caches()
    assert calls(jax.grad(layer("relu")), *ARRAYS) == 0
    jax.clear_caches()
