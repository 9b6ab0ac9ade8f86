"""One of several processes that train together: see test_hosts.py."""

import pickle
import sys
from pathlib import Path

import jax
import numpy as np

from bnjax.cli import run_reporting
from bnjax.training.config import HostsConfig
from bnjax.training.hosts import join_hosts


def main():
    coordinator, index, strategy, out = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    join_hosts(HostsConfig(coordinator, 2, int(index), 60))
    assert len(jax.devices()) == 4

    from tests.integration import networks

    config = networks.configuration(parallel=strategy)
    results = {}
    for name in ("mlp", "conv"):
        state, _ = networks.run(name, config, 4, 50)
        results[name] = [
            np.asarray(leaf)
            for leaf in jax.tree.leaves((state.params, state.batch_stats))
        ]
    Path(out).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    sys.exit(run_reporting(main))
