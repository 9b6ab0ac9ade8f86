"""The metrics of a run, and the state of its BN layers, for TensorBoard."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bnjax.training.metrics import Record
from bnjax.training.state import TrainState
from bnjax.training.workdir import TENSORBOARD, writing


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
