"""The streaming path under SIGKILL: the resumed run is the one never stopped."""

import random
import sys
import time

import pytest

from tests.integration.test_resume import finish, kill, results, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
FLAGS = [
    *("--steps", 400, "--log-every", 25, "--eval-every", 60, "--checkpoint-every", 40),
    *("--data.name", "synthetic:12x12x3:5:500", "--data.path", "streaming"),
    *("--data.augment.kind", "crop", "--batch-size", 30, "--model.hidden", 16),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """The folder of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(workdir, cache, flags=FLAGS), workdir)
    return workdir


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_next_example(undisturbed, cache, tmp_path):
    killed = tmp_path / "killed"
    for checkpoint, workers in (("80", 1), ("240", 2)):
        process = start(
            killed, cache, "--resume", "--data.workers", workers, flags=FLAGS
        )
        ends = time.monotonic() + 60
        while not (killed / "checkpoints" / checkpoint).exists():
            assert process.poll() is None, killed.with_suffix(".log").read_text()
            assert time.monotonic() < ends
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (killed / "summary.json").exists()
    finish(start(killed, cache, "--resume", flags=FLAGS), killed)
    assert results(killed) == results(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_killed_runs(undisturbed, cache, tmp_path, seed):
    workdir, source = tmp_path / "run", random.Random(seed)
    workers = ["--data.workers", seed % 3]
    process = start(workdir, cache, *workers, flags=FLAGS)
    kill(process, workdir, source, saving=seed % 2 == 0)
    finish(start(workdir, cache, "--resume", flags=FLAGS), workdir)
    assert results(workdir) == results(undisturbed)
