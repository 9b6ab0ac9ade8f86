"""Two processes of two devices each, over loopback, are one run."""

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.integration import networks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(*argv, **variables):
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, seconds=150):
    """Return what each printed, and leave none behind."""
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


SLOW_SPMD = ["pmap", pytest.param("spmd", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SLOW_SPMD)
def test_fifty_steps_are_the_same_in_float64(strategy, port, tmp_path, x64):
    outs = [tmp_path / str(index) for index in range(2)]
    workers = [
        start(
            "-m",
            "tests.integration.hosts_worker",
            f"127.0.0.1:{port}",
            i,
            strategy,
            out,
        )
        for i, out in enumerate(outs)
    ]
    printed = finish(*workers)
    assert [worker.returncode for worker in workers] == [0, 0], printed
    first, second = (pickle.loads(out.read_bytes()) for out in outs)
    for name in ("mlp", "conv"):
        config = networks.configuration(parallel="single")
        expected, _ = networks.run(name, config, 1, 50)
        leaves = jax.tree.leaves((expected.params, expected.batch_stats))
        for a, b, c in zip(first[name], second[name], leaves, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, c, rtol=0, atol=1e-10)


FLAGS = [
    *("--steps", 30, "--log-every", 10, "--eval-every", 30, "--checkpoint-every", 30),
    *("--batch-size", 64, "--model.hidden", 12, "--model.weight-std", 0.1),
]


@pytest.mark.parametrize("strategy", SLOW_SPMD)
def test_train_py_on_two_hosts_writes_one_run(strategy, port, tmp_path):
    workdir = tmp_path / "run"
    hosts = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", "2"]
    argv = [*FLAGS, "--parallel", strategy, *hosts]
    processes = [
        start(
            ROOT / "train.py",
            *argv,
            "--hosts.index",
            i,
            "--workdir",
            workdir if i == 0 else tmp_path / "unused",
        )
        for i in range(2)
    ]
    printed = finish(*processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    alone = start(
        ROOT / "train.py", *FLAGS, "--parallel", "single", "--workdir", tmp_path / "one"
    )
    finish(alone)
    found, expected = (
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("run", "one")
    )
    assert found["test_correct"] == expected["test_correct"]
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
    assert not (tmp_path / "unused").exists()
    assert "test accuracy" in printed[0][0]
    assert "test accuracy" not in printed[1][0]


def open_mpi(index, port):
    """What Open MPI's launcher tells each process, as JAX reads it."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


def slurm(index, port):
    """Likewise, Slurm's."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [open_mpi, slurm])
def test_hosts_that_a_launcher_started(launcher, port, tmp_path):
    folders = [tmp_path / str(index) for index in range(2)]
    processes = [
        start(
            ROOT / "train.py",
            *(*FLAGS, "--hosts.coordinator", "auto", "--workdir", folder),
            **launcher(index, port),
        )
        for index, folder in enumerate(folders)
    ]
    printed = finish(*processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert json.loads((folders[0] / "summary.json").read_text())["steps"] == 30
    assert not folders[1].exists()
    assert "test accuracy" in printed[0][0]
    assert "test accuracy" not in printed[1][0]


def test_auto_outside_any_cluster_fails_at_once(tmp_path):
    started = time.monotonic()
    process = start(
        ROOT / "train.py",
        *("--hosts.coordinator", "auto", "--workdir", tmp_path / "run"),
    )
    _, error = finish(process, seconds=60)[0]
    assert time.monotonic() - started < 30
    assert process.returncode == 2
    assert error.startswith("error: --hosts.coordinator auto: JAX finds no cluster")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_host_that_never_comes_is_not_waited_for(port, tmp_path):
    started = time.monotonic()
    processes = [
        start(
            ROOT / "train.py",
            *("--hosts.coordinator", f"127.0.0.1:{port + delta}"),
            *("--hosts.count", 2, "--hosts.index", index, "--hosts.timeout", 3),
            *("--workdir", tmp_path / str(index)),
        )
        for index, delta in ((0, 0), (1, 1))
    ]
    first, second = finish(*processes, seconds=60)
    assert time.monotonic() - started < 60
    assert [process.returncode for process in processes] == [1, 1]
    assert "host(s) 1 of --hosts.count 2 did not come within 3 s" in first[1]
    assert "host 0 was not reached" in second[1]
    assert "Traceback" not in first[1] + second[1]
    assert not (tmp_path / "0").exists()


def test_a_port_in_use_is_named(port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        process = start(
            ROOT / "train.py",
            *("--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", 2),
        )
        _, error = finish(process, seconds=60)[0]
    assert process.returncode == 1
    assert f"port {port} cannot be used on this host: Address already in use" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_host_that_dies_ends_the_other_within_a_minute(killed, port, tmp_path):
    processes = [
        start(
            ROOT / "train.py",
            *("--steps", 10**8, "--log-every", 10, "--batch-size", 64),
            *("--eval-every", 10**7, "--checkpoint-every", 10**7),
            *("--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", 2),
            *("--hosts.index", index, "--workdir", tmp_path / str(index)),
        )
        for index in range(2)
    ]
    try:
        metrics = tmp_path / "0" / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not metrics.exists() or not metrics.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.5)
        processes[killed].kill()
        died = time.monotonic()
        _, error = processes[1 - killed].communicate(timeout=60)
        assert time.monotonic() - died < 60
    finally:
        for process in processes:
            process.kill()
        finish(*processes)
    status = processes[1 - killed].returncode
    # JAX may be first, and end the process with a message of its own.
    assert status in (1, -signal.SIGABRT)
    assert ("one of them died" if status == 1 else "another task died") in error
    assert "Traceback" not in error or status != 1
