"""Eight devices and two processes give what one gives."""

import pickle

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.population import recompute_batch_stats
from tests.integration.test_hosts import finish, port, start
from tests.population import network, oracle

__all__ = ["port"]
METHODS = ["paper", "pooled"]


def mesh():
    return jax.make_mesh((network.DEVICES,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("method", METHODS)
def test_global_arrays_sharded_over_eight_devices(method):
    call, variables, batches = network.make()
    replicated = jax.device_put(variables, NamedSharding(mesh(), P()))
    sharded = jax.device_put(batches, NamedSharding(mesh(), P(None, "data")))
    found = recompute_batch_stats(call, replicated, sharded, method=method)
    want = network.expected(variables, batches, method)
    oracle.assert_relative(found, want, 1e-6)
    for new, old in zip(
        jax.tree.leaves(found), jax.tree.leaves(replicated["batch_stats"]), strict=True
    ):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_pmap(axis_name, method):
    """A part is a mini-batch, unless its layers share statistics with the others."""
    call, variables, batches = network.make(axis_name)
    parts = batches.reshape(3, network.DEVICES, -1, 4)
    found = recompute_batch_stats(
        call, variables, parts, method=method, axis_name="batch"
    )
    small = batches if axis_name else parts.reshape(-1, *parts.shape[2:])
    want = network.expected(variables, small, method)
    oracle.assert_relative(found, want, 1e-6)


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_shard_map_of_the_callers_own(axis_name):
    call, variables, batches = network.make(axis_name)
    mapped = jax.shard_map(
        call,
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P() if axis_name else P("data")),
    )
    parts = batches.reshape(3 * network.DEVICES, -1, 4)
    want = network.expected(variables, batches if axis_name else parts, "paper")
    found = recompute_batch_stats(mapped, variables, batches)
    oracle.assert_relative(found, want, 1e-6)


def test_vmap_that_shares_statistics():
    call, variables, batches = network.make("batch")
    mapped = jax.vmap(call, (None, 0), axis_name="batch")
    parts = batches.reshape(3, network.DEVICES, -1, 4)
    found = recompute_batch_stats(mapped, variables, parts, method="pooled")
    want = network.expected(variables, batches, "pooled")
    oracle.assert_relative(found, want, 1e-6)


@pytest.mark.slow
def test_two_processes(port, tmp_path):
    outs = [tmp_path / str(index) for index in range(2)]
    worker = ("-m", "tests.population.hosts_worker", f"127.0.0.1:{port}")
    workers = [start(*worker, index, out) for index, out in enumerate(outs)]
    printed = finish(*workers)
    assert [each.returncode for each in workers] == [0, 0], printed
    first, second = (pickle.loads(out.read_bytes()) for out in outs)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _, variables, batches = network.make()
    parts = batches.reshape(3 * 4, -1, 4)
    for method in METHODS:
        want = network.expected(variables, batches, method)
        oracle.assert_relative(first["jit", method], want, 1e-6)
        oracle.assert_relative(first["pmap, shared", method], want, 1e-6)
        want = network.expected(variables, parts, method)
        oracle.assert_relative(first["pmap", method], want, 1e-6)
