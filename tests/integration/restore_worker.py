"""A process that goes on from a run's checkpoint: see test_hosts_resume.py."""

import dataclasses
import pickle
import sys
from pathlib import Path

import jax
import numpy as np

from bnjax.cli import run_reporting
from bnjax.data.sources import open_data
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.config import HostsConfig
from bnjax.training.hosts import join_hosts
from bnjax.training.loop import Run
from bnjax.training.step import state_sha256
from bnjax.training.workdir import read_config


def go_on(workdir, steps, **changes):
    """Restore on these devices, and take some steps.

    Returns:
        The step and the digest of the state restored, and the leaves after the steps.
    """
    config = dataclasses.replace(read_config(workdir), **changes)
    run = Run(config, open_data(config.data, config.data_dir))
    with open_checkpoints(workdir, config, read_only=True) as checkpoints:
        run.resume(checkpoints)
    restored = run.step, state_sha256(run.state)
    run.dispatch(steps)
    state = run.state
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    run.close()
    return *restored, [np.asarray(leaf) for leaf in leaves]


def main():
    coordinator, index, strategy, workdir, steps, out = sys.argv[1:]
    join_hosts(HostsConfig(coordinator, 2, int(index), 60))
    assert len(jax.devices()) == 4
    found = go_on(Path(workdir), int(steps), parallel=strategy, devices=None)
    Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    sys.exit(run_reporting(main))
