"""What a run measures, one JSON object a line in metrics.jsonl."""

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from bnjax.training.workdir import METRICS, replacing, writing


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """Means over the steps of one dispatch.

    Args:
        step: steps taken so far.
        loss: mean of the steps' losses, each before its step.
        accuracy: likewise, between 0 and 1.
        learning_rate: of the last step.
        steps_per_second: of this dispatch, neither compiling nor evaluating.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    steps_per_second: float
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class TestRecord:
    """An evaluation after `step` steps, over the whole test set."""

    step: int
    loss: float
    accuracy: float
    split: str = "test"


Record = TrainRecord | TestRecord


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
