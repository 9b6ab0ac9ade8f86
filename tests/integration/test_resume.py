"""Runs that are killed or stopped, and resumed: each ends as if nothing had been."""

import functools
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

import eval as eval_program
import train as train_program
from bnjax.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
ROOT = Path(__file__).parents[2]
# Dispatches, evaluations and checkpoints that do not fall together.
FLAGS = {
    "resident": [
        *("--steps", 2400, "--log-every", 25, "--eval-every", 60),
        *("--checkpoint-every", 40, "--model.hidden", 16),
        *("--optim.options", "momentum=0.9", "--learning-rate", 0.02),
    ],
    "streaming": [
        *("--steps", 400, "--log-every", 25, "--eval-every", 60),
        *("--checkpoint-every", 40, "--model.hidden", 16, "--batch-size", 30),
        *("--data.name", "synthetic:12x12x3:5:500", "--data.path", "streaming"),
        *("--data.augment.kind", "crop"),
    ],
}


def start(workdir, cache, *more, path="resident"):
    """Start train.py on one device, with what it prints in a file beside workdir."""
    argv = [*FLAGS[path], "--workdir", workdir, "--compilation-cache", cache, *more]
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


def wait_for(process, happened, seconds=150):
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
            partial = {
                path.name for path in folder.glob("*.orbax-checkpoint-tmp")
            } - seen
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

    try:
        wait_for(process, happened)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """Give the folder of a run that was never stopped."""

    @functools.cache
    def run(path):
        workdir = tmp_path_factory.mktemp("runs") / path
        finish(start(workdir, cache, path=path), workdir)
        return workdir

    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", FLAGS)
@pytest.mark.parametrize("seed", range(20))
def test_killed_runs(undisturbed, cache, tmp_path, path, seed):
    workdir, source = tmp_path / "run", random.Random(seed)
    for kills in range(3 if seed % 5 == 0 else 1):
        workers = ["--data.workers", (seed + kills) % 3] if path == "streaming" else []
        process = start(workdir, cache, "--resume", *workers, path=path)
        kill(process, workdir, source, saving=(seed + kills) % 2 == 0)
    finish(start(workdir, cache, "--resume", path=path), workdir)
    assert results(workdir) == results(undisturbed(path))


@pytest.mark.slow
def test_a_run_stopped_by_a_signal(undisturbed, cache, tmp_path, capsys):
    workdir = tmp_path / "run"
    process = start(workdir, cache)
    assert wait_for(process, (workdir / "checkpoints" / "200").exists)
    # While it is there, others may read the run but not write to it.
    process.send_signal(signal.SIGSTOP)
    flags = [*map(str, FLAGS["resident"]), "--workdir", str(workdir)]
    for resume in ([], ["--resume"]):
        assert train_program.main([*flags, *resume]) == 1
        message = f"{workdir} is being written by process {process.pid} on "
        assert message in capsys.readouterr().err
    output = str(tmp_path / "eval.json")
    assert eval_program.main([str(workdir), "--output", output]) == 0
    assert "test accuracy" in capsys.readouterr().out
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    log = finish(process, workdir, 130)
    assert "Traceback" not in log
    assert "SIGINT: finishing the current steps" in log
    found = re.search(r"after step ([\d,]+)\. The last good checkpoint is (\S+)\.", log)
    assert found is not None
    step = int(found[1].replace(",", ""))
    assert found[2] == str(workdir / "checkpoints" / str(step))
    assert (workdir / "checkpoints" / str(step) / "sha256.json").exists()
    assert 200 <= step < 2400
    assert read_metrics(workdir)[-1]["step"] == step

    log = finish(start(workdir, cache, "--resume"), workdir)
    assert f"resuming at step {step:,}" in log
    assert results(workdir)[:2] == results(undisturbed("resident"))[:2]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(cache, tmp_path):
    workdir = tmp_path / "run"
    # One dispatch of a minute and more.
    counts = ("--steps", "--log-every", "--eval-every", "--checkpoint-every")
    long = [word for count in counts for word in (count, 3_000_000)]
    process = start(workdir, cache, *long, "--model.hidden", 512)
    try:
        assert wait_for(process, (workdir / "metrics.jsonl").exists)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
        assert "Traceback" not in workdir.with_suffix(".log").read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_sigterm(cache, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, cache)
    assert wait_for(process, (workdir / "checkpoints" / "200").exists)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in finish(process, workdir, 143)
