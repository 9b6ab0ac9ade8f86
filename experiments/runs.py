"""Runs of train.py for the experiments: each trained once and kept.

A run that has ended is one line of runs/experiments/<experiment>.jsonl, by its
configuration. An experiment that is started again trains only what is not there; delete
the file to train all again. Each record names the commit it was measured at.
"""

import dataclasses
import datetime as dt
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, commit
from bnjax.data.sources import open_data
from bnjax.training.config import Config, result_config
from bnjax.training.faults import DivergedError
from bnjax.training.loop import Run, train
from bnjax.training.metrics import read_metrics
from bnjax.training.workdir import CONFIG

RUNS = ROOT / "runs" / "experiments"
DIGITS = 6


def once(
    experiment: str, config: Config, measure: Callable[[Config], dict[str, Any]]
) -> dict[str, Any]:
    """Return what `measure` gave for a configuration, now or when it was first asked.

    Args:
        experiment: names the file of records; one file has one `measure`.
        config: of the run.
        measure: trains, and returns what JSON can hold.

    Returns:
        The record, with "seed", "seconds", "commit" and "date" added.
    """
    path = RUNS / f"{experiment}.jsonl"
    given = {**result_config(config), "steps": config.steps}
    settings = json.dumps(given, sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            if kept["key"] == key:
                return kept["record"]
    started = time.perf_counter()
    record = measure(config) | {
        "seed": config.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, "record": record}) + "\n")
    return record


def run_once(preset: str, config: Config) -> dict[str, Any]:
    """Train one network as train.py does; return its curves and its end.

    Args:
        preset: the name that the run's folder records.
        config: of the run. With a workdir the run stays there, with its checkpoints,
            and one that was stopped is taken up again; without, it is deleted.

    Returns:
        "steps", "test_accuracy" and "test_loss" of each evaluation, "train_steps" and
        "train_loss" (the mean since the step before), "final_test_accuracy",
        "steps_per_second", "state_sha256", and "diverged": what the run was stopped
        with, or None. A run that diverged has no end.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = config.workdir or Path(folder) / "run"
        stopped = (workdir / CONFIG).exists()
        own = dataclasses.replace(config, workdir=workdir, resume=stopped)
        summary, diverged = {}, None
        try:
            summary = train(preset, own)
        except DivergedError as error:
            diverged = str(error).split(". ")[0]
        records = read_metrics(workdir)
    tests = [record for record in records if record["split"] == "test"]
    trained = [record for record in records if record["split"] == "train"]
    return {
        "steps": [record["step"] for record in tests],
        "test_accuracy": [rounded(record["accuracy"]) for record in tests],
        "test_loss": [rounded(record["loss"]) for record in tests],
        "train_steps": [record["step"] for record in trained],
        "train_loss": [rounded(record["loss"]) for record in trained],
        "final_test_accuracy": summary.get("test_accuracy"),
        "steps_per_second": summary.get("steps_per_second"),
        "state_sha256": summary.get("state_sha256"),
        "diverged": diverged,
    }


def visit(config: Config, steps: list[int]) -> Iterator[Run]:
    """Train in this process and stop at some steps, to look at the state.

    Nothing is written. The run is that of train.py, bit for bit.

    Args:
        config: of the run.
        steps: where to stop, rising, from 0 on; the last ends the run.

    Yields:
        The same run each time, at the next of the steps.
    """
    run = Run(config, open_data(config.data, config.data_dir))
    try:
        for step in steps:
            if step > run.step:
                _advance(run, step)
            yield run
    finally:
        run.close()


def _advance(run: Run, step: int) -> None:
    """Take the steps up to `step`, in dispatches of one length where it can be."""
    while run.step < step:
        run.dispatch(min(run.config.log_every, step - run.step))


def rounded(value: float) -> float:
    """Return a number as the result files hold it."""
    return float(f"{value:.{DIGITS}g}")
