"""What a run measures, and where it goes: metrics.jsonl, TensorBoard, the terminal."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from bnjax._files import replacing
from bnjax.training.step import TrainState
from bnjax.training.workdir import METRICS, TENSORBOARD, writing

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """Means over the steps of one dispatch, without the steps that were dropped.

    Attributes:
        step: Steps taken so far.
        loss: Mean of the steps' losses, each before its step.
        accuracy: Likewise, between 0 and 1.
        learning_rate: Of the last step.
        steps_per_second: Of this dispatch, without compilation and evaluation.
        dropped: Steps dropped so far because they were not finite.
        split: The examples measured.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    steps_per_second: float
    dropped: int = 0
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """An evaluation after `step` steps, over the whole test set."""

    step: int
    loss: float
    accuracy: float
    split: str = "test"


Record = TrainRecord | EvalRecord


def train_record(
    step_metrics: dict[str, np.ndarray],
    step: int,
    dropped: int,
    seconds: float,
    schedule: Callable[[int], Any],
) -> TrainRecord | None:
    """Return the record of one dispatch, or None if all its steps were dropped.

    Args:
        step_metrics: "loss" and "accuracy" of each step, shape (steps,), and "dropped"
            where steps may be dropped.
        step: Steps taken so far, including dropped ones.
        dropped: Steps dropped so far.
        seconds: Duration of the dispatch.
        schedule: The learning rate by the optimizer's count, which does not include
            dropped steps.

    Example:
        >>> step_metrics = {
        ...     "loss": np.array([1.0, np.nan, 2.0]),
        ...     "accuracy": np.array([0.5, 0.0, 0.7]),
        ...     "dropped": np.array([False, True, False]),
        ... }
        >>> train_record(step_metrics, 3, 1, 0.5, lambda count: 0.1 * count).loss
        1.5
    """
    losses, accuracies = step_metrics["loss"], step_metrics["accuracy"]
    kept = ~step_metrics.get("dropped", np.zeros(losses.shape, bool))
    if not kept.any():
        return None
    return TrainRecord(
        step=step,
        loss=float(losses[kept].mean(dtype=np.float64)),
        accuracy=float(accuracies[kept].mean(dtype=np.float64)),
        learning_rate=float(np.asarray(schedule(step - dropped - 1))),
        steps_per_second=losses.size / seconds,
        dropped=dropped,
    )


class MetricsWriter:
    """Appends records to metrics.jsonl and, on request, to TensorBoard's event files.

    Args:
        workdir: The folder of the run.
        step: Of the state that training continues from. Later records in the files are
            dropped, since they will be written again.
        tensorboard: Write event files too.
    """

    def __init__(
        self, workdir: Path, step: int = 0, *, tensorboard: bool = False
    ) -> None:
        self._path = workdir / METRICS
        self._board: Any = None
        with writing(self._path):
            _drop_after(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
            if tensorboard:
                # The import takes a second, and most runs do without.
                from tensorboardX import SummaryWriter

                folder = os.fspath(workdir / TENSORBOARD)
                self._board = SummaryWriter(folder, purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append one record; each is in the file before the next."""
        values = dataclasses.asdict(record)
        with writing(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            step, split = values.pop("step"), values.pop("split")
            for name, value in values.items() if self._board else ():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def histograms(self, step: int, state: TrainState) -> None:
        """Add histograms of each BN layer's arrays to TensorBoard."""
        with writing(self._path):
            for name, values in layer_values(state.params, state.batch_stats):
                self._board.add_histogram(name, values, step)

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        with writing(self._path):
            self._file.close()
            if self._board:
                self._board.close()


def _drop_after(path: Path, step: int) -> None:
    """Drop the records of later steps, and a last line that is not whole."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    with replacing(path) as file:
        file.writelines(kept)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in the order they were written."""
    lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def layer_values(params: Any, batch_stats: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the path and the values of each array of each BN layer.

    Example:
        >>> stats = {"block": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
        >>> params = {
        ...     "block": {"bn": {"scale": np.ones(2)}, "dense": {"bias": np.ones(3)}}
        ... }
        >>> [path for path, _ in layer_values(params, stats)]
        ['block/bn/scale', 'block/bn/mean', 'block/bn/var']
    """
    statistics = flatten_dict(batch_stats)
    parameters = flatten_dict(params)
    for layer in dict.fromkeys(path[:-1] for path in statistics):
        for tree in (parameters, statistics):
            for path, leaf in tree.items():
                if path[:-1] == layer:
                    yield "/".join(path), np.asarray(leaf)


class ProgressBar:
    """Shows how far a run is: a bar on a terminal, elsewhere a line now and then.

    Lines come for the first record, for the last, and at most every `seconds` between.

    Args:
        steps: Of the run.
        stream: Where to show it; standard error if None.
        first: Steps taken before, by a run that is resumed.
        seconds: The least time between two lines.
    """

    def __init__(
        self,
        steps: int,
        stream: TextIO | None = None,
        *,
        first: int = 0,
        seconds: float = 5.0,
    ) -> None:
        self._steps = steps
        self._stream = stream or sys.stderr
        self._seconds = seconds
        self._shown = -float("inf")
        self._test = ""
        self._bar = None
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(
                total=steps,
                initial=first,
                file=self._stream,
                bar_format=BAR,
                dynamic_ncols=True,
            )

    def show(self, record: Record) -> None:
        """Show a training record with the latest evaluation, if it is time."""
        if isinstance(record, EvalRecord):
            self._test = f", test {record.accuracy:.2%}"
            if self._bar is None:
                self._test += f" at step {record.step:,}"
            return
        text = (
            f"loss {record.loss:.4f}, accuracy {record.accuracy:.2%}, "
            f"lr {record.learning_rate:.3g}, {record.steps_per_second:,.0f} steps/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{text}{self._test}", refresh=False)
            self._bar.update(record.step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown < self._seconds and record.step < self._steps:
            return
        self._shown = now
        left = round((self._steps - record.step) / record.steps_per_second)
        print(
            f"step {record.step:,}/{self._steps:,}  {text}, "
            f"{timedelta(seconds=left)} left{self._test}",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class ProgressReporter:
    """Shows how much of a data set is done, if that takes longer than `seconds`.

    Args:
        name: Of the data set.
        stream: Where to show it; standard error if None.
        seconds: The least time between two lines.
        verb: What is being done with the data set.
    """

    def __init__(
        self,
        name: str,
        stream: TextIO | None = None,
        seconds: float = 1.0,
        verb: str = "reading",
    ) -> None:
        self._name = name
        self._stream = stream or sys.stderr
        self._seconds = seconds
        self._verb = verb
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` examples are done, if it is time."""
        now = time.monotonic()
        if now - self._shown < self._seconds:
            return
        self._shown = now
        left = timedelta(seconds=round((now - self._started) * (total - done) / done))
        print(
            f"{self._verb} {self._name}: {done:,} of {total:,} examples, {left} left",
            file=self._stream,
            flush=True,
        )
