"""Runs that are killed or stopped, and resumed: each ends as if nothing had been."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnjax.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="needs POSIX signals and rename"
)
ROOT = Path(__file__).parents[2]
# Dispatches, evaluations and checkpoints that do not fall together.
COUNTS = {"steps": 2400, "log-every": 25, "eval-every": 60, "checkpoint-every": 40}
OTHERS = {"model.hidden": 16, "optim.options": "momentum=0.9", "learning-rate": 0.02}
FLAGS = [
    word for name, value in (COUNTS | OTHERS).items() for word in (f"--{name}", value)
]


def start(workdir, cache, *more, flags=FLAGS):
    """Start train.py on one device, with what it prints in a file beside workdir."""
    argv = [*flags, "--workdir", workdir, "--compilation-cache", cache, *more]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, argv)],
            env=environment,
            stdout=log,
            stderr=log,
        )


def finish(process, workdir, status=0, seconds=120):
    log = workdir.with_suffix(".log")
    try:
        assert process.wait(timeout=seconds) == status, log.read_text()
    finally:
        process.kill()
    return log.read_text()


def results(workdir):
    """All of a run that must not depend on how often it was interrupted."""
    summary = json.loads((workdir / "summary.json").read_text())
    records = read_metrics(workdir)
    for record in records:
        record.pop("steps_per_second", None)
    names = ("state_sha256", "test_accuracy", "test_loss", "steps", "parameters")
    kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    return {name: summary[name] for name in names}, records, kept


def wait_for(process, happened, seconds=60):
    """Return whether it happened before the process ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if happened():
            return True
        time.sleep(0.0005)
    assert process.poll() is not None, "nothing happened"
    return False


def kill(process, workdir, random_source, *, saving):
    """Kill at some moment, or while a checkpoint is being written."""
    if saving:
        folder = workdir / "checkpoints"
        skipped = iter(range(random_source.randrange(4)))
        seen = set()

        def happened():
            partial = {path.name for path in folder.glob("*.partial")} - seen
            seen.update(partial)
            return bool(partial) and next(skipped, None) is None
    else:
        moment = None
        delay = random_source.uniform(0, 1.5)

        def happened():
            nonlocal moment
            if moment is None and (workdir / "metrics.jsonl").exists():
                moment = time.monotonic() + delay
            return moment is not None and time.monotonic() > moment

    wait_for(process, happened)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """The folder of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(workdir, cache), workdir)
    assert list(cache.iterdir())
    return workdir


@pytest.mark.slow
def test_a_run_killed_three_times(undisturbed, cache, tmp_path):
    workdir, source = tmp_path / "run", random.Random(3)
    for saving in (False, True, True):
        process = start(workdir, cache, "--resume")
        kill(process, workdir, source, saving=saving)
    log = finish(start(workdir, cache, "--resume"), workdir)
    assert "resuming at step" in log
    assert results(workdir) == results(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_killed_runs(undisturbed, cache, tmp_path, seed):
    workdir, source = tmp_path / "run", random.Random(seed)
    kill(start(workdir, cache), workdir, source, saving=seed % 2 == 0)
    finish(start(workdir, cache, "--resume"), workdir)
    assert results(workdir) == results(undisturbed)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGINT, 130),
    ],
)
def test_a_run_stopped_by_a_signal(undisturbed, cache, tmp_path, number, status):
    workdir = tmp_path / "run"
    process = start(workdir, cache)
    assert wait_for(process, (workdir / "checkpoints" / "200").exists)
    process.send_signal(number)
    log = finish(process, workdir, status)
    assert "Traceback" not in log
    assert f"{number.name}: finishing the steps under way" in log
    found = re.search(r"after step ([\d,]+)\. The last good checkpoint is (\S+)\.", log)
    assert found is not None
    step = int(found[1].replace(",", ""))
    assert found[2] == str(workdir / "checkpoints" / str(step))
    assert (workdir / "checkpoints" / str(step) / "manifest.json").exists()
    assert 200 <= step < 2400
    assert read_metrics(workdir)[-1]["step"] == step

    if number == signal.SIGTERM:
        log = finish(start(workdir, cache, "--resume"), workdir)
        assert f"resuming at step {step:,}" in log
        assert results(workdir)[:2] == results(undisturbed)[:2]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(cache, tmp_path):
    workdir = tmp_path / "run"
    # One dispatch of a minute and more.
    long = ["--steps", "3000000", "--log-every", "1000000", "--model.hidden", "512"]
    rest = ["--eval-every", "1000000", "--checkpoint-every", "1000000"]
    process = start(workdir, cache, flags=[*long, *rest])
    try:
        metrics = workdir / "metrics.jsonl"
        assert wait_for(process, metrics.exists)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        log = workdir.with_suffix(".log")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
