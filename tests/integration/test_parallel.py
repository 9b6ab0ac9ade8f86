"""The same answer on any number of devices, under every strategy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.integration import networks

LAYOUTS = [
    ("pmap", 1),
    ("spmd", 2),
    ("pmap", 2),
    ("spmd", 4),
    ("pmap", 4),
    ("spmd", 8),
    ("pmap", 8),
]
NETWORKS = ["mlp", pytest.param("conv", marks=pytest.mark.slow)]
ON_EIGHT = [
    pytest.param(*layout, marks=[] if layout[1] == 8 else pytest.mark.slow)
    for layout in LAYOUTS
]


@functools.cache
def reference(name, steps, dtype, **changes):
    """One device's run."""
    config = networks.configuration(parallel="single", **changes)
    return networks.run(name, config, 1, steps, dtype)


@pytest.mark.parametrize(("strategy", "devices"), ON_EIGHT)
@pytest.mark.parametrize("name", NETWORKS)
def test_fifty_steps_are_the_same_in_float64(name, strategy, devices, x64):
    config = networks.configuration(parallel=strategy)
    expected, expected_metrics = reference(name, 50, jnp.float64)
    state, metrics = networks.run(name, config, devices, 50)
    assert int(state.step) == 50
    networks.assert_close(state, expected, 1e-10)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], atol=1e-10)
    np.testing.assert_allclose(metrics["accuracy"], expected_metrics["accuracy"])


@pytest.mark.parametrize(("strategy", "devices"), ON_EIGHT)
@pytest.mark.parametrize("name", ["conv", pytest.param("mlp", marks=pytest.mark.slow)])
def test_one_step_is_the_same_in_float32(name, strategy, devices):
    config = networks.configuration(parallel=strategy)
    expected, _ = reference(name, 1, jnp.float32)
    state, _ = networks.run(name, config, devices, 1, jnp.float32)
    networks.assert_close(state, expected, 1e-6)


@pytest.mark.parametrize("strategy", ["pmap", "spmd"])
@pytest.mark.parametrize(
    ("sync", "virtual", "examples"),
    [
        ("per-device", None, 8),
        pytest.param("group:2", None, 16, marks=pytest.mark.slow),
        pytest.param("group:4", None, None, marks=pytest.mark.slow),
        pytest.param("global", 16, 16, marks=pytest.mark.slow),
        pytest.param("global", 4, 4, marks=pytest.mark.slow),
        ("per-device", 2, 2),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_devices_are_virtual_batches(
    name, sync, virtual, examples, strategy, x64
):
    config = networks.configuration(
        parallel=strategy, sync=sync, virtual_batch_size=virtual
    )
    # Normalized in pairs, a network doubles a difference of one rounding every step or
    # two: 1e-17 after one step, 4e-15 after 10, 3e-5 after 50.
    steps = {8: 50, 2: 10}.get(examples, 5)
    expected, _ = reference(name, steps, jnp.float64, virtual_batch_size=examples)
    state, _ = networks.run(name, config, 4, steps)
    networks.assert_close(state, expected, 1e-10)
    if examples is not None:
        whole, _ = reference(name, steps, jnp.float64)
        with pytest.raises(AssertionError):
            networks.assert_close(state, whole, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_per_device_is_a_virtual_batch_in_float32(name):
    config = networks.configuration(parallel="pmap", sync="per-device")
    expected, _ = reference(name, 1, jnp.float32, virtual_batch_size=4)
    state, _ = networks.run(name, config, 8, 1, jnp.float32)
    networks.assert_close(state, expected, 1e-6)


@pytest.mark.parametrize(
    "strategy", ["pmap", pytest.param("spmd", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "sync", ["global", pytest.param("per-device", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_micro_batches_are_the_same_on_any_devices(name, sync, strategy, x64):
    config = networks.configuration(parallel=strategy, accumulate=2, sync=sync)
    virtual = 4 if sync == "per-device" else None
    expected, _ = reference(
        name, 5, jnp.float64, accumulate=2, virtual_batch_size=virtual
    )
    state, _ = networks.run(name, config, 4, 5)
    networks.assert_close(state, expected, 1e-10)


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("single", 1), pytest.param("pmap", 2, marks=pytest.mark.slow)],
)
def test_one_step_a_call_equals_many(strategy, devices, x64):
    config = networks.configuration(parallel=strategy)
    expected, many = networks.run("conv", config, devices, 6)
    state, singles = networks.run("conv", config, devices, 6, at_once=1)
    networks.assert_close(state, expected, 1e-12)
    np.testing.assert_allclose(singles["loss"], many["loss"], rtol=1e-12)
    np.testing.assert_array_equal(singles["accuracy"], many["accuracy"])
