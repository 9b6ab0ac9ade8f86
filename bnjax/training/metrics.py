"""What a run measures, one JSON object a line in metrics.jsonl."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import numpy as np
from tqdm import tqdm

from bnjax.training.step import TrainState
from bnjax.training.workdir import METRICS, TENSORBOARD, replacing, writing


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """Means over the steps of one dispatch; over those kept, where some are dropped.

    Args:
        step: steps taken so far.
        loss: mean of the steps' losses, each before its step.
        accuracy: likewise, between 0 and 1.
        learning_rate: of the last step.
        steps_per_second: of this dispatch, neither compiling nor evaluating.
        dropped: steps dropped so far, since they were not finite.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    steps_per_second: float
    dropped: int = 0
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class TestRecord:
    """An evaluation after `step` steps, over the whole test set."""

    step: int
    loss: float
    accuracy: float
    split: str = "test"


Record = TrainRecord | TestRecord


def train_record(
    taken: dict[str, np.ndarray],
    step: int,
    dropped: int,
    seconds: float,
    schedule: Callable[[int], Any],
) -> TrainRecord | None:
    """Return what the steps of one dispatch amount to; None if all were dropped.

    Args:
        taken: the "loss" and the "accuracy" of each, shape (steps,), and "dropped"
            where steps may be.
        step: steps taken so far, dropped ones with them.
        dropped: steps dropped so far.
        seconds: that the dispatch took.
        schedule: the learning rate by the optimizer's count, which leaves out the steps
            that were dropped.

    Example:
        >>> taken = {
        ...     "loss": np.array([1.0, np.nan, 2.0]),
        ...     "accuracy": np.array([0.5, 0.0, 0.7]),
        ...     "dropped": np.array([False, True, False]),
        ... }
        >>> train_record(taken, 3, 1, 0.5, lambda count: 0.1 * count).loss
        1.5
    """
    losses, accuracies = taken["loss"], taken["accuracy"]
    kept = ~taken.get("dropped", np.zeros(losses.shape, bool))
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
    """Appends records to metrics.jsonl, each in the file before the next.

    Args:
        workdir: the folder of the run.
        step: of the state that training goes on from: what was written after it is
            cut off, and will be written again.
    """

    def __init__(self, workdir: Path, step: int = 0) -> None:
        self._path = workdir / METRICS
        with writing(self._path):
            _cut(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            RunError: the disk is full.
        """
        with writing(self._path):
            self._file.write(json.dumps(dataclasses.asdict(record)) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with writing(self._path):
            self._file.close()


def _cut(path: Path, step: int) -> None:
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


def read_metrics(workdir: Path) -> list[dict]:
    """Return the records of a run, in the order they were written."""
    lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class TensorBoard:
    """Writes event files to the folder `tensorboard` of a run.

    Args:
        workdir: the folder of the run.
        step: of the state that training goes on from: TensorBoard no longer shows what
            was written after it.
    """

    def __init__(self, workdir: Path, step: int = 0) -> None:
        # It costs a second to import, and most runs do without.
        from tensorboardX import SummaryWriter

        self._path = workdir / TENSORBOARD
        with writing(self._path):
            self._writer = SummaryWriter(os.fspath(self._path), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add a record's numbers as `<split>/<name>`."""
        numbers = dataclasses.asdict(record)
        step, split = numbers.pop("step"), numbers.pop("split")
        with writing(self._path):
            for name, value in numbers.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def histograms(self, step: int, state: TrainState) -> None:
        """Add a histogram of each BN layer's scale, bias, mean and var."""
        with writing(self._path):
            for name, values in layer_values(state.params, state.batch_stats):
                self._writer.add_histogram(name, values, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with writing(self._path):
            self._writer.close()


def layer_values(params: Any, batch_stats: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values of all that each BN layer has.

    Example:
        >>> import numpy as np
        >>> stats = {"block": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
        >>> params = {
        ...     "block": {"bn": {"scale": np.ones(2)}, "dense": {"bias": np.ones(3)}}
        ... }
        >>> [name for name, _ in layer_values(params, stats)]
        ['block/bn/scale', 'block/bn/mean', 'block/bn/var']
    """
    return _layer_values(params, batch_stats, "")


def _layer_values(
    params: Any, batch_stats: Any, path: str
) -> Iterator[tuple[str, np.ndarray]]:
    for name, below in batch_stats.items():
        if isinstance(below, Mapping):
            yield from _layer_values(params.get(name, {}), below, f"{path}{name}/")
    if "mean" in batch_stats:
        for values in (params, batch_stats):
            for name, leaf in values.items():
                yield f"{path}{name}", np.asarray(leaf)


BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"


class Progress(Protocol):
    """Shows how far a run is."""

    def train(self, record: TrainRecord) -> None:
        """Show a training record."""
        ...

    def test(self, record: TestRecord) -> None:
        """Show an evaluation."""
        ...

    def close(self) -> None:
        """Show no more."""
        ...


def make_progress(
    steps: int, stream: TextIO | None = None, *, first: int = 0
) -> Progress:
    """Return a bar where `stream` is a terminal, and lines elsewhere.

    Args:
        steps: of the run.
        stream: where to show it; standard error if None.
        first: steps taken before, by a run that is resumed.
    """
    stream = stream or sys.stderr
    at_terminal = stream is not None and stream.isatty()
    return Bar(steps, stream, first) if at_terminal else Lines(steps, stream)


class Bar:
    """A bar of steps, with time left, loss, accuracy, learning rate and steps/s."""

    def __init__(self, steps: int, stream: TextIO | None, first: int = 0) -> None:
        self._bar = tqdm(
            total=steps,
            initial=first,
            file=stream,
            bar_format=BAR,
            dynamic_ncols=True,
        )
        self._test = ""

    def train(self, record: TrainRecord) -> None:
        """Show a training record."""
        self._bar.set_postfix_str(f"{_describe(record)}{self._test}", refresh=False)
        self._bar.update(record.step - self._bar.n)

    def test(self, record: TestRecord) -> None:
        """Show an evaluation."""
        self._test = f", test {record.accuracy:.2%}"

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Lines:
    """A line now and then: the first record, the last, and one in some seconds.

    Args:
        steps: of the run.
        stream: where to write.
        seconds: the least time between two lines.
    """

    def __init__(self, steps: int, stream: TextIO | None, seconds: float = 5.0) -> None:
        self._steps = steps
        self._stream = stream
        self._seconds = seconds
        self._shown = -float("inf")
        self._test = ""

    def train(self, record: TrainRecord) -> None:
        """Write a training record, if it is time."""
        now = time.monotonic()
        if now - self._shown < self._seconds and record.step < self._steps:
            return
        self._shown = now
        left = (self._steps - record.step) / record.steps_per_second
        print(
            f"step {record.step:,}/{self._steps:,}  {_describe(record)}, "
            f"{timedelta(seconds=round(left))} left{self._test}",
            file=self._stream,
            flush=True,
        )

    def test(self, record: TestRecord) -> None:
        """Remember an evaluation for the next line."""
        self._test = f", test {record.accuracy:.2%} at step {record.step:,}"

    def close(self) -> None:
        """Nothing is open."""


def _describe(record: TrainRecord) -> str:
    return (
        f"loss {record.loss:.4f}, accuracy {record.accuracy:.2%}, "
        f"lr {record.learning_rate:.3g}, {record.steps_per_second:,.0f} steps/s"
    )


class Loading:
    """Shows how much of a data set is done, where that takes a while.

    Args:
        name: of the data set.
        stream: where to show it; standard error if None.
        seconds: the least time between two lines.
        verb: what is being done with it.
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
