"""What a run measures, one JSON object a line in metrics.jsonl."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bnjax.training.workdir import METRICS, replacing, writing


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
            UserError: the disk is full.
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
