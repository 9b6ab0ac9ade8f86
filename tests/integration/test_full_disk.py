"""A disk that is full for real: a small tmpfs."""

import gc
import os
import subprocess
import time
import types

import jax
import pytest

import train as train_program
from bnjax.training import checkpoint
from bnjax.training.metrics import read_metrics
from tests.integration.test_hosts import finish, port, two_hosts
from tests.integration.test_resume import results

__all__ = ["port"]

# A checkpoint has 0.35 MB, and asks for twice that and 0.25 MB before it starts.
FLAGS = [
    *("--steps", "60", "--log-every", "20", "--eval-every", "20", "--keep", "1"),
    *("--checkpoint-every", "20", "--model.hidden", "256", "256"),
    *("--parallel", "single", "--batch-size", "50"),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    before = jax.config.jax_compilation_cache_dir
    yield [*FLAGS, "--compilation-cache", str(tmp_path_factory.mktemp("compiled"))]
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train_program.main([*flags, "--workdir", str(workdir)]) == 0
    return workdir


def mount(*argv):
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of some kilobytes; return its folder and what resizes it."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    problem = mount("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    if problem is not None:
        pytest.skip(f"a tmpfs cannot be mounted here: {problem}")

    def resize(kilobytes):
        options = f"remount,size={kilobytes}k"
        assert mount("mount", "-o", options, str(folder)) is None

    try:
        yield folder, resize
    finally:
        assert mount("umount", str(folder)) is None


@pytest.fixture
def orbax_threads_may_fail():
    """Let writers of orbax that a full disk ended find its event loop closed."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("orbax_threads_may_fail")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("found", ["before writing", "while writing"])
def test_a_full_disk_stops_the_run_which_goes_on_once_there_is_room(
    disk, whole, flags, found, capsys, monkeypatch
):
    folder, resize = disk
    if found == "while writing":
        # As if there were room when the checkpoint is begun.
        room = types.SimpleNamespace(free=2**40)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: room)
        resize(560)
    else:
        resize(1200)
    workdir = folder / "run"
    capsys.readouterr()
    started = time.monotonic()
    assert train_program.main([*flags, "--workdir", str(workdir)]) == 1
    assert time.monotonic() - started < 30
    message = capsys.readouterr().err
    assert "Traceback" not in message
    good = workdir / "checkpoints" / "20"
    wanted = workdir / "checkpoints" / "40"
    assert f"checkpoint {wanted} could not be written: " in message
    assert f"The last good checkpoint is {good}." in message
    reason = "bytes left" if found == "before writing" else "No space left on device"
    assert reason in message
    assert [path.name for path in good.parent.iterdir()] == ["20"]

    resize(20_000)
    assert train_program.main([*flags, "--workdir", str(workdir), "--resume"]) == 0
    assert "resuming at step 20" in capsys.readouterr().err
    assert results(workdir) == results(whole)
    assert read_metrics(workdir)[-1]["step"] == 60


@pytest.mark.slow
def test_a_full_disk_of_host_0_ends_all_hosts(disk, port):
    folder, resize = disk
    resize(1200)
    argv = [*FLAGS[: FLAGS.index("--parallel")], "--batch-size", 64]
    processes = two_hosts(port, *argv, "--workdir", folder / "run")
    (_, first), (_, second) = finish(*processes)
    assert processes[0].returncode == 1
    good = folder / "run" / "checkpoints" / "20"
    assert f"The last good checkpoint is {good}." in first
    assert "Traceback" not in first
    assert processes[1].returncode != 0
    assert "died" in second
