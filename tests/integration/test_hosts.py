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

import train as train_program
from bnjax.training.config import HostsConfig, RunError
from bnjax.training.hosts import join_hosts
from tests.integration import networks
from tests.integration.restore_worker import go_on

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


COUNTS = ("--steps", "--eval-every", "--checkpoint-every")
FLAGS = [
    *("--steps", 30, "--log-every", 10, "--eval-every", 30, "--checkpoint-every", 30),
    *("--batch-size", 64, "--model.hidden", 12, "--model.weight-std", 0.1),
]


def two_hosts(port, *more, own=((), ())):
    """Start train.py on two hosts."""
    hosts = ("--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", 2)
    return [
        start(ROOT / "train.py", *FLAGS, *hosts, "--hosts.index", i, *more, *own[i])
        for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SLOW_SPMD)
def test_train_py_on_two_hosts_writes_one_run(strategy, port, tmp_path):
    own = [("--workdir", tmp_path / name) for name in ("run", "unused")]
    processes = two_hosts(port, "--parallel", strategy, own=own)
    alone = [*FLAGS, "--parallel", "single", "--workdir", tmp_path / "one"]
    assert train_program.main([*map(str, alone)]) == 0
    printed = finish(*processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    found, expected = (
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("run", "one")
    )
    assert found["test_correct"] == expected["test_correct"]
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
    assert not (tmp_path / "unused").exists()
    assert "test accuracy" in printed[0][0]
    assert "test accuracy" not in printed[1][0]


def test_hosts_that_were_told_different_things_all_end(port, tmp_path):
    own = [("--workdir", tmp_path / "run"), ("--seed", 4, "--learning-rate", 0.5)]
    processes = two_hosts(port, "--seed", 3, own=own)
    for _, error in finish(*processes):
        assert "error: the hosts differ: " in error
        assert "--seed: host 0 has 3, host 1 has 4" in error
        assert "--learning-rate: host 0 has 0.1, host 1 has 0.5" in error
        assert "Traceback" not in error
    assert [process.returncode for process in processes] == [2, 2]
    assert not (tmp_path / "run").exists()


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


@pytest.mark.slow
def test_hosts_that_do_not_meet(port, tmp_path):
    """Host 0 and host 1 wait at different ports, and a third looks for a cluster."""
    workdir = ("--workdir", tmp_path / "run")
    alone = ("--hosts.count", 2, "--hosts.timeout", 3, *workdir)
    started = time.monotonic()
    processes = [
        start(
            *(ROOT / "train.py", "--hosts.coordinator", f"127.0.0.1:{port + index}"),
            *("--hosts.index", index, *alone),
        )
        for index in range(2)
    ]
    processes.append(start(ROOT / "train.py", "--hosts.coordinator", "auto", *workdir))
    (_, first), (_, second), (_, auto) = finish(*processes, seconds=90)
    assert time.monotonic() - started < 60
    assert [process.returncode for process in processes] == [1, 1, 2]
    assert "not all of the --hosts.count 2 hosts connected within 3 s" in first
    assert "host 0 was not reached, or another host did not connect" in second
    assert "auto: JAX finds no cluster" in auto
    for error in (first, second, auto):
        assert "Traceback" not in error
        assert "stack trace" not in error
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(RunError, match=f"port {port} cannot be used on this host"):
            join_hosts(HostsConfig(f"127.0.0.1:{port}", 2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_host_that_dies_ends_the_other_within_a_minute(killed, port, tmp_path):
    rare = (word for name in COUNTS for word in (name, 10**8))
    flags = (*rare, "--log-every", 10)
    own = [("--workdir", tmp_path / str(index)) for index in range(2)]
    processes = two_hosts(port, *flags, own=own)
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
    assert ("one of them ended" if status == 1 else "another task died") in error
    assert "Traceback" not in error or status != 1


EIGHT = [
    *("--steps", "40", "--log-every", "10", "--eval-every", "40", "--batch-size", "64"),
    *("--checkpoint-every", "20", "--model.hidden", "12", "--model.weight-std", "0.1"),
    *("--optim.options", "momentum=0.9", "--parallel", "pmap"),
]


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """The folder of a run on eight devices, at step 40."""
    workdir = tmp_path_factory.mktemp("runs") / "eight"
    assert train_program.main([*EIGHT, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def expected(eight_devices):
    """The digest of its checkpoint, and where eight devices go on to from there."""
    step, digest, leaves = go_on(eight_devices, 20)
    summary = json.loads((eight_devices / "summary.json").read_text())
    assert (step, digest) == (40, summary["state_sha256"])
    return digest, leaves


def assert_goes_on(found, expected):
    step, digest, leaves = found
    assert (step, digest) == (40, expected[0])
    for a, b in zip(leaves, expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("spmd", 2)])
def test_a_checkpoint_of_eight_devices_on_fewer(
    eight_devices, expected, strategy, devices
):
    found = go_on(eight_devices, 20, parallel=strategy, devices=devices)
    assert_goes_on(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pmap", "spmd"])
def test_a_checkpoint_of_eight_devices_on_two_hosts(
    eight_devices, expected, strategy, port, tmp_path
):
    outs = [tmp_path / str(index) for index in range(2)]
    workers = [
        start(
            *("-m", "tests.integration.restore_worker", f"127.0.0.1:{port}", index),
            *(strategy, eight_devices, 20, out),
        )
        for index, out in enumerate(outs)
    ]
    printed = finish(*workers)
    assert [worker.returncode for worker in workers] == [0, 0], printed
    for out in outs:
        assert_goes_on(pickle.loads(out.read_bytes()), expected)


LONG = ["--steps", 120, "--eval-every", 120, "--checkpoint-every", 10]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["SIGTERM", "SIGKILL"])
def test_a_run_of_two_hosts_is_resumed(stopped, port, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    undisturbed = two_hosts(port, *LONG, "--workdir", whole)
    printed = finish(*undisturbed)
    assert [process.returncode for process in undisturbed] == [0, 0], printed

    processes = two_hosts(port, *LONG, "--workdir", workdir)
    deadline = time.monotonic() + 90
    try:
        while not (workdir / "checkpoints" / "10").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[0].send_signal(getattr(signal, stopped))
    finally:
        printed = finish(*processes)
    if stopped == "SIGTERM":
        assert [process.returncode for process in processes] == [143, 143], printed
        assert "stopped by SIGTERM after step" in printed[0][1]
    assert not (workdir / "summary.json").exists()

    processes = two_hosts(port, *LONG, "--workdir", workdir, "--resume")
    printed = finish(*processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "resuming at step" in printed[0][1]
    assert "resuming at step" in printed[1][1]
    found, expected = (
        json.loads((folder / "summary.json").read_text()) for folder in (workdir, whole)
    )
    for name in ("state_sha256", "test_loss", "test_correct", "steps"):
        assert found[name] == expected[name]
    # And back on one device.
    restored = go_on(whole, 10, parallel="single")[:2]
    assert restored == (120, expected["state_sha256"])
