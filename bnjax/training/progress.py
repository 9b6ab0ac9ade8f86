"""What a person sees of a run: a bar on a terminal, lines in a log file."""

import sys
import time
from datetime import timedelta
from typing import Protocol, TextIO

from tqdm import tqdm

from bnjax.training.metrics import TestRecord, TrainRecord

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
