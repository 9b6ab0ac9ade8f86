"""One of two processes that estimate statistics together: see test_devices.py."""

import pickle
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.cli import run_reporting
from bnjax.population import recompute_batch_stats
from bnjax.training.config import HostsConfig
from bnjax.training.hosts import join_hosts


def main():
    coordinator, index, out = sys.argv[1:]
    join_hosts(HostsConfig(coordinator, 2, int(index), 60))
    assert len(jax.devices()) == 4

    from tests.population.networks import mlp

    host = jax.process_index()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    results = {}
    for method in ("paper", "pooled"):
        call, variables, batches = mlp()
        own = np.split(batches, 2, axis=1)[host]
        rows = NamedSharding(mesh, P("data"))
        together = (jax.make_array_from_process_local_data(rows, x) for x in own)
        found = recompute_batch_stats(call, variables, together, method=method)
        results["jit", method] = found
        for name in (None, "batch"):
            call, variables, _ = mlp(name)
            found = recompute_batch_stats(
                call,
                variables,
                own.reshape(3, 2, -1, 4),
                method=method,
                axis_name="batch",
            )
            results["pmap, shared" if name else "pmap", method] = found
    Path(out).write_bytes(pickle.dumps(jax.tree.map(np.asarray, results)))


if __name__ == "__main__":
    sys.exit(run_reporting(main))
