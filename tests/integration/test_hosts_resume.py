"""Checkpoints on other devices and hosts, and runs of several hosts resumed."""

import json
import pickle
import signal
import time

import numpy as np
import pytest

import train as train_program
from tests.integration.restore_worker import go_on
from tests.integration.test_hosts import ROOT, finish, port, start

__all__ = ["port"]

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


LONG = [
    *("--steps", 120, "--log-every", 10, "--eval-every", 120, "--batch-size", 64),
    *("--checkpoint-every", 10, "--model.hidden", 12, "--model.weight-std", 0.1),
]


def two_hosts(workdir, port, *more):
    return [
        start(
            ROOT / "train.py",
            *(*LONG, "--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", 2),
            *("--hosts.index", index, "--workdir", workdir, *more),
        )
        for index in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["SIGTERM", "SIGKILL"])
def test_a_run_of_two_hosts_is_resumed(stopped, port, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    undisturbed = two_hosts(whole, port)
    printed = finish(*undisturbed)
    assert [process.returncode for process in undisturbed] == [0, 0], printed

    processes = two_hosts(workdir, port)
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

    processes = two_hosts(workdir, port, "--resume")
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
