"""Eight devices and two processes give what one gives."""

import pickle

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.population import recompute_batch_stats
from tests.integration.test_hosts import finish, port, start
from tests.population.networks import (
    DEVICES,
    METHODS,
    assert_relative,
    mlp,
    mlp_population,
)

__all__ = ["port"]


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("method", METHODS)
def test_global_arrays_sharded_over_eight_devices(method):
    call, variables, batches = mlp()
    replicated = jax.device_put(variables, NamedSharding(mesh(), P()))
    sharded = jax.device_put(batches, NamedSharding(mesh(), P(None, "data")))
    found = recompute_batch_stats(call, replicated, sharded, method=method)
    want = mlp_population(variables, batches, method)
    assert_relative(found, want)
    for new, old in zip(
        jax.tree.leaves(found), jax.tree.leaves(replicated["batch_stats"]), strict=True
    ):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_pmap(axis_name, method):
    """A part is a mini-batch, unless its layers share statistics with the others."""
    call, variables, batches = mlp(axis_name)
    parts = batches.reshape(3, DEVICES, -1, 4)
    found = recompute_batch_stats(
        call, variables, parts, method=method, axis_name="batch"
    )
    small = batches if axis_name else parts.reshape(-1, *parts.shape[2:])
    want = mlp_population(variables, small, method)
    assert_relative(found, want)


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_shard_map_of_the_callers_own(axis_name):
    call, variables, batches = mlp(axis_name)
    mapped = jax.shard_map(
        call,
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P() if axis_name else P("data")),
    )
    parts = batches.reshape(3 * DEVICES, -1, 4)
    want = mlp_population(variables, batches if axis_name else parts, "paper")
    found = recompute_batch_stats(mapped, variables, batches)
    assert_relative(found, want)


def test_vmap_that_shares_statistics():
    call, variables, batches = mlp("batch")
    mapped = jax.vmap(call, (None, 0), axis_name="batch")
    parts = batches.reshape(3, DEVICES, -1, 4)
    found = recompute_batch_stats(mapped, variables, parts, method="pooled")
    want = mlp_population(variables, batches, "pooled")
    assert_relative(found, want)


def test_random_streams_of_nnx_go_on_under_pmap_too():
    """Dropout hides other units in each batch, as in training."""

    class Dropped(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.bn(self.dropout(x))

    def call(model, x):
        return model(x)

    ones = np.ones((3, 2, 8, 4), np.float32)
    options = {"method": "pooled", "axis_name": "d"}
    new = recompute_batch_stats(call, Dropped(), ones, **options)
    np.testing.assert_allclose(new["bn"]["mean"][...], np.ones(4), atol=0.6)
    # The same numbers on every device, others in every batch.
    one = recompute_batch_stats(call, Dropped(), ones[:, 0], method="pooled")
    np.testing.assert_allclose(new["bn"]["mean"][...], one["bn"]["mean"][...])
    first = recompute_batch_stats(call, Dropped(), ones[:1], **options)
    assert not np.array_equal(new["bn"]["mean"][...], first["bn"]["mean"][...])


@pytest.mark.slow
def test_two_processes(port, tmp_path):
    outs = [tmp_path / str(index) for index in range(2)]
    worker = ("-m", "tests.population.hosts_worker", f"127.0.0.1:{port}")
    workers = [start(*worker, index, out) for index, out in enumerate(outs)]
    printed = finish(*workers)
    assert [each.returncode for each in workers] == [0, 0], printed
    first, second = (pickle.loads(out.read_bytes()) for out in outs)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _, variables, batches = mlp()
    parts = batches.reshape(3 * 4, -1, 4)
    for method in METHODS:
        want = mlp_population(variables, batches, method)
        assert_relative(first["jit", method], want)
        assert_relative(first["pmap, shared", method], want)
        want = mlp_population(variables, parts, method)
        assert_relative(first["pmap", method], want)
