"""Trained runs, opened from their folders."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

from bnjax.data.sources import Source, open_data
from bnjax.training.build import Program, build
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.config import Config
from bnjax.training.description import read_config
from bnjax.training.errors import UserError
from bnjax.training.feed import make_run_feed
from bnjax.training.layouts import Spmd
from bnjax.training.population import Population, averaged
from bnjax.training.progress import Loading
from bnjax.training.state import TrainState
from bnjax.training.workdir import CHECKPOINTS

Statistics = Literal["moving_averages", "population"]
"""What a network is normalized by: those of training, or taken again after it."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run, opened.

    Args:
        workdir: its folder.
        config: what it was told.
        source: its data set.
    """

    workdir: Path
    config: Config
    source: Source

    def restore(self) -> tuple[Program, TrainState]:
        """Build the network and read its newest checkpoint.

        Raises:
            UserError: there is none, or none is whole.
        """
        program = build(self.config, self.source)
        with open_checkpoints(self.workdir, self.config, read_only=True) as found:
            state, _ = found.restore(program.initial_state())
        return program, state

    def with_statistics(
        self,
        kind: Statistics | None,
        program: Program,
        state: TrainState,
        parallel: Spmd,
        batches: int | None,
    ) -> TrainState:
        """Return the state to evaluate, of the averaged parameters with `--ema`.

        Args:
            kind: of its statistics; those that the run evaluated with if None.
            program: of `restore`.
            state: likewise.
            parallel: where to compute.
            batches: of training, for population statistics.
        """
        if kind == "moving_averages":
            return averaged(self.config, state)
        if kind is None and self.config.ema is None:
            return state
        report = Loading(self.source.name, verb="taking statistics of")
        with contextlib.closing(make_run_feed(self.config, self.source)) as feed:
            population = Population(self.config, program, feed, parallel)
            if kind is None:
                return population.evaluated(state)
            state = averaged(self.config, state)
            return population.estimated(state, batches, report=report)

    def tested_on(self) -> str:
        """Name the test set as decoded: its files, split and size of images."""
        key = self.source.cache_key
        return key("test") if key else self.source.name


def open_trained(workdir: Path, data_dir: Path | None = None) -> Trained:
    """Open a run from its folder alone, reading no example.

    Args:
        workdir: the folder that train.py wrote.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Raises:
        UserError: the folder is no run, or something in it is damaged.
    """
    config = read_config(workdir)
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(
            f"{workdir} has no {CHECKPOINTS}: the run ended before its first one. "
            "Train again in a new --workdir."
        )
    source = open_data(config.data, data_dir or config.data_dir)
    return Trained(workdir, config, source)
