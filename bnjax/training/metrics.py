"""What a run measures, one JSON object a line in metrics.jsonl."""

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Self

from bnjax.training.workdir import METRICS, writing


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
    """Appends records to metrics.jsonl, each on the disk before the next.

    Args:
        workdir: the folder of the run.
    """

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / METRICS
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            UserError: the disk is full.
        """
        with writing(self._path):
            self._file.write(json.dumps(dataclasses.asdict(record)) + "\n")
            self._file.flush()

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


def read_metrics(workdir: Path) -> list[dict]:
    """Return the records of a run, in the order they were written."""
    lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
