"""Shared code of the experiments: configurations, records of runs, and results.

A finished run is one line of runs/experiments/<experiment>.jsonl, by its configuration.
A second start of an experiment trains only runs that are not there; delete the file to
train all of them again. Each record names the commit of its measurement.
"""

import dataclasses
import datetime as dt
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import Figure, save
from benchmarks.report import ROOT, command_of, commit, write_result
from bnjax.data.sources import Arrays, open_data
from bnjax.training.config import Config, result_config
from bnjax.training.faults import DivergedError
from bnjax.training.loop import Run, train
from bnjax.training.metrics import read_metrics
from bnjax.training.presets import PRESETS
from bnjax.training.program import Program
from bnjax.training.workdir import CONFIG

RUNS = ROOT / "runs" / "experiments"
RESULTS = ROOT / "experiments" / "results"
CIFAR10 = "cifar10_jpeg"
"""The data set of all experiments on CIFAR-10: a lossy copy, which results name."""
DIGITS = 6


def preset(name: str, changes: dict[str, Any] | None = None) -> Config:
    """Return the configuration of a preset, with the changes of `changed`."""
    config = PRESETS[name].config
    data = {"data.name": CIFAR10} if name.startswith("cifar10-") else {}
    return changed(config, data | (changes or {}))


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """Return a configuration with some fields exchanged, by their dotted names.

    Examples:
        >>> changed(preset("mnist"), {"seed": 3, "model.weight_std": 0.1}).seed
        3
    """
    for name, value in changes.items():
        field, _, rest = name.partition(".")
        own = changed(getattr(config, field), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{field: own})
    return config


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


def finish(
    name: str,
    result: Any,
    seeds: Sequence[int],
    draw: Callable[[dict[str, Any]], Figure] | None = None,
    *,
    module: str | None = None,
) -> None:
    """Write experiments/results/<name>.json and docs/figures/<name>.png; print where.

    Args:
        name: of the experiment.
        result: what was measured.
        seeds: of its runs.
        draw: makes the figure of what the file holds.
        module: of the experiment, where it has another name.
    """
    path = RESULTS / f"{name}.json"
    command = command_of(f"experiments.{module or name}")
    record = write_result(path, command, list(seeds), result)
    print(path)
    if draw is not None:
        print(save(draw(record), name))


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


def visit(config: Config, steps: Sequence[int]) -> Iterator[Run]:
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
            # In dispatches of one length where it can be.
            while run.step < step:
                run.dispatch(min(run.config.log_every, step - run.step))
            yield run
    finally:
        run.close()


def variables_of(state: Any) -> dict[str, Any]:
    """Return the variables of the network in a training state."""
    return {"params": state.params, "batch_stats": state.batch_stats}


class Task:
    """The network and the data of a run, to measure with.

    Args:
        config: of the run.
        size: examples in a batch of the test set; all of them go into batches.

    Attributes:
        model: the network, a linen module, as it is evaluated.
        train: training examples.
        test: test examples.
    """

    def __init__(self, config: Config, size: int = 250):
        source = open_data(config.data, config.data_dir)
        program = Program(config, source)
        self.model: Any = program.model
        self.train, self.test = (
            jax.device_put(source.load(name, lambda *_: None))
            for name in ("train", "test")
        )
        self._size = size
        self._gather = jax.jit(program.gather)
        self._predict = jax.jit(
            lambda variables, images: jnp.argmax(
                self.model.apply(variables, images, train=False), axis=-1
            )
        )

    def images(self, arrays: Arrays, rows: Any) -> jax.Array:
        """Return the network's inputs for some rows of `train` or `test`."""
        return self._gather(arrays, rows)["image"]

    def call(self, variables: Any, images: jax.Array) -> Any:
        """Apply the network as a training step does."""
        return self.model.apply(variables, images, train=True, mutable=["batch_stats"])

    def accuracy(
        self, variables: Any, change: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> float:
        """Return the accuracy on the test images, changed batch by batch."""
        labels = np.asarray(self.test.labels)
        parts = np.array_split(np.arange(len(labels)), -(-len(labels) // self._size))
        correct = [
            self._predict(variables, change(self.images(self.test, part)))
            == labels[part]
            for part in parts
        ]
        return rounded(float(np.mean(np.concatenate(correct))))


def median(values: Sequence[float]) -> float:
    """Return the median, as the result files hold it."""
    return rounded(float(np.median(values)))


def rounded(value: float) -> float:
    """Return a number as the result files hold it."""
    return float(f"{value:.{DIGITS}g}")
