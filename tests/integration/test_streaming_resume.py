"""The streaming path under SIGKILL: the resumed run is the one never stopped."""

import sys
import time

import pytest

from tests.integration.test_resume import finish, results, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
FLAGS = [
    *("--steps", 400, "--log-every", 25, "--eval-every", 60, "--checkpoint-every", 40),
    *("--data.name", "synthetic:12x12x3:5:500", "--data.path", "streaming"),
    *("--data.augment.kind", "crop", "--batch-size", 30, "--model.hidden", 16),
]


def test_a_killed_run_goes_on_with_the_next_example(tmp_path):
    cache = tmp_path / "compiled"
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(undisturbed, cache, flags=FLAGS), undisturbed)
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
