"""Measurements of a run, and their outputs: .jsonl files, TensorBoard, stderr."""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from bnjax._files import replacing
from bnjax._validate import layer_name
from bnjax.training.config import RunError
from bnjax.training.step import TrainState
from bnjax.training.workdir import LAYERS, METRICS, TENSORBOARD, writing

PERCENTILES = (15, 50, 85)
"""The percentiles of every distribution in layers.jsonl, as in the paper's Figure 1."""
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """Means over the steps of one dispatch, without dropped steps.

    The learning rate is that of the last step. Loss and accuracy are measured before
    each step. The rate of steps excludes compilation and evaluation.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    steps_per_second: float
    dropped: int = 0
    """The number of steps dropped so far, because they were not finite."""
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
        step_metrics: the metrics of `train_step`, shape (steps, ...).
        step: the number of steps so far.
        dropped: the number of dropped steps so far. The optimizer's count, which
            determines the learning rate, does not include them.
        seconds: the time of the dispatch.
        schedule: the learning rate as a function of the optimizer's count.

    Returns:
        The record, or None.
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


def layer_record(
    step: int, state: TrainState, inputs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return a line of layers.jsonl: the distributions of each BN layer's arrays.

    Args:
        step: the number of steps so far.
        state: one copy of the training state.
        inputs: some inputs of each nonlinearity, shape (values, features), by layer;
            empty if they are not recorded.

    Returns:
        A dict. "layers" has the PERCENTILES of the features for each array of each BN
        layer. "inputs" has, for each nonlinearity, the percentiles of all values
        ("all") and of the values of the first feature ("first").
    """

    def percentiles(values: np.ndarray) -> list[float]:
        found = np.percentile(values.astype(np.float32), PERCENTILES)
        return [float(f"{value:.6g}") for value in found]

    layers: dict[str, dict[str, list[float]]] = {}
    for path, values in layer_values(state.params, state.batch_stats):
        *layer, name = path.split("/")
        layers.setdefault(layer_name(layer), {})[name] = percentiles(values)
    found = {
        layer: {"all": percentiles(u), "first": percentiles(u[:, 0])}
        for layer, u in inputs.items()
    }
    return {"step": step, "layers": layers, "inputs": found}


class MetricsWriter:
    """Appends records to a run's two files and, on request, to TensorBoard's files.

    Training continues after `step` steps. Records of later steps are removed from the
    files, because the run will write them again.
    """

    def __init__(
        self, workdir: Path, step: int = 0, *, tensorboard: bool = False
    ) -> None:
        self._path = workdir / METRICS
        self._board: Any = None
        self._file = _open_at(self._path, step)
        self._layers = _open_at(workdir / LAYERS, step)
        if tensorboard:
            # The import takes a second, and most runs do not need it.
            from tensorboardX import SummaryWriter

            with writing(self._path):
                folder = os.fspath(workdir / TENSORBOARD)
                self._board = SummaryWriter(folder, purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append one record, and flush it to the file."""
        values = dataclasses.asdict(record)
        with writing(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            step, split = values.pop("step"), values.pop("split")
            for name, value in values.items() if self._board else ():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def write_layers(self, record: Mapping[str, Any]) -> None:
        """Append a record of `layer_record`, if it has a layer."""
        if record["layers"] or record["inputs"]:
            with writing(self._path):
                self._layers.write(json.dumps(record) + "\n")
                self._layers.flush()

    def histograms(self, step: int, state: TrainState) -> None:
        """Add histograms of each BN layer's arrays to TensorBoard."""
        with writing(self._path):
            for name, values in layer_values(state.params, state.batch_stats):
                self._board.add_histogram(name, values, step)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with writing(self._path):
            for file in (self._file, self._layers):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        with writing(self._path):
            self._file.close()
            self._layers.close()
            if self._board:
                self._board.close()


def _open_at(path: Path, step: int) -> TextIO:
    """Open a file for appending, without its lines of steps after this one."""

    def is_kept(line: str) -> bool:
        # The last line may be incomplete.
        return line.endswith("\n") and json.loads(line)["step"] <= step

    with writing(path):
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            with replacing(path) as file:
                file.writelines(itertools.takewhile(is_kept, lines))
        return path.open("a", encoding="utf-8")


def read_metrics(workdir: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Return the records of one of a run's two files, in the order of writing.

    A last line without an end is ignored, because it is incomplete.
    """
    path, records = workdir / name, []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    records.append(json.loads(line))
                    if not isinstance(records[-1].get("step"), int):
                        raise ValueError(f"line {len(records)} has no step")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Restore the file, or train again."
        ) from error
    return records


def layer_values(params: Any, batch_stats: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the path and the values of each array of each BN layer."""
    statistics = flatten_dict(batch_stats)
    leaves = [*flatten_dict(params).items(), *statistics.items()]
    for layer in dict.fromkeys(path[:-1] for path in statistics):
        for path, leaf in leaves:
            if path[:-1] == layer:
                yield "/".join(path), np.asarray(leaf)


class ProgressBar:
    """Shows the progress of a run, as a bar on a terminal or as lines elsewhere.

    There are lines for the first and the last record, and at most every `seconds`
    between. `first` is the number of earlier steps. None as `stream` is standard error.
    """

    def __init__(
        self,
        steps: int,
        stream: TextIO | None = None,
        *,
        first: int = 0,
        seconds: float = 5.0,
    ) -> None:
        self._steps, self._seconds = steps, seconds
        self._stream = stream or sys.stderr
        self._shown, self._test, self._bar = -float("inf"), "", None
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
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


@dataclasses.dataclass
class ProgressReporter:
    """Shows the progress on a data set, if it takes longer than `seconds`.

    None as `stream` is standard error. `verb` says what is done with the data set.
    """

    name: str
    stream: TextIO | None = None
    seconds: float = 1.0
    verb: str = "reading"

    def __post_init__(self) -> None:
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` examples are done, if it is time."""
        now = time.monotonic()
        if now - self._shown < self.seconds:
            return
        self._shown = now
        left = timedelta(seconds=round((now - self._started) * (total - done) / done))
        print(
            f"{self.verb} {self.name}: {done:,} of {total:,} examples, {left} left",
            file=self.stream or sys.stderr,
            flush=True,
        )
