"""A run in memory: what loop.py trains and experiments look into."""

import sys
import time
from typing import Any

import jax
import numpy as np

from bnjax.data.blocks import load_test
from bnjax.data.sources import Source
from bnjax.training.build import build
from bnjax.training.checkpoint import Checkpoints
from bnjax.training.config import Config
from bnjax.training.evaluation import Evaluation, Evaluator
from bnjax.training.feed import make_run_feed
from bnjax.training.layouts import Spmd
from bnjax.training.nonfinite import Guard, forward_order
from bnjax.training.parallel import make_parallel
from bnjax.training.population import Population
from bnjax.training.pretrained import first_state
from bnjax.training.progress import Loading
from bnjax.training.state import TrainState


class Run:
    """A run in memory: its data, its functions, and the state it has come to."""

    def __init__(
        self,
        config: Config,
        source: Source,
        parallel: Spmd | None = None,
        *,
        resuming: bool = False,
    ) -> None:
        self.config = config
        self._parallel = parallel = parallel or make_parallel(config)
        self.program = program = build(config, source)
        report = Loading(source.name)
        # What a resumed run started from may be gone.
        first = program.initial_state() if resuming else first_state(config, program)
        self._state = parallel.place_state(first)
        self.step = 0
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self._evaluator = Evaluator(
            program,
            load_test(config.data, source, report),
            config.eval_batch_size,
            parallel,
        )
        self._feed = make_run_feed(
            config,
            source,
            shards=jax.process_count(),
            shard=jax.process_index(),
            report=report,
        )
        self._most_steps = self._feed.chunk_steps if program.scans() else 1
        self._constants = parallel.place(self._feed.constants)
        self._population = None
        if config.ema is not None:
            several = jax.process_count() > 1
            self._population = Population(
                config,
                program,
                make_run_feed(config, source) if several else self._feed,
                parallel,
                None if several else self._constants,
            )
        self.guard = Guard(
            skip=config.on_nan == "skip",
            layers=lambda: forward_order(program.model, program.images),
        )
        self._train_steps = parallel.train_steps(
            program.train_step(parallel), self._feed.batch
        )
        self._compiled = {}

    @property
    def state(self) -> TrainState:
        """One copy of the state, as a checkpoint holds it."""
        return self._parallel.host_state(self._state)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, or from the start where there is none."""
        if not checkpoints.steps():
            print("no checkpoint to resume from: starting at step 0", file=sys.stderr)
            first = first_state(self.config, self.program)
            self._state = self._parallel.place_state(first)
            return
        state, notes = checkpoints.restore(self.state)
        self._state = self._parallel.place_state(state)
        self.step = int(state.step)
        self.seconds = notes.seconds
        self.guard.dropped = notes.dropped
        self._feed.restore(notes.feed)
        print(f"resuming at step {self.step:,}", file=sys.stderr)

    def place_in_data(self) -> dict[str, Any]:
        """Return where the input stands, for a checkpoint."""
        return self._feed.state()

    def close(self) -> None:
        """End what reads the data."""
        self._feed.close()
        if self._population is not None:
            self._population.close()

    def dispatch(self, steps: int) -> tuple[dict[str, np.ndarray], float]:
        """Take some steps in one call to the device.

        The time is taken from drawing the examples to having the losses; compiling
        is done before it starts.

        Args:
            steps: how many.

        Returns:
            What `train_step` measured of each, shape (steps, ...), and the seconds.
        """
        limit = self._most_steps
        parts = [min(limit, steps - done) for done in range(0, steps, limit)]
        for part in set(parts):
            self._compile(part)
        started = time.perf_counter()
        scores = []
        # The device takes one part while the host draws the next.
        for part in parts:
            chunk = self._parallel.place_chunk(self._feed.chunk(self.step, part))
            self._state, taken = self._compiled[part](
                self._state, self._constants, chunk
            )
            scores.append(taken)
            self.step += part
        measured = jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return measured, seconds

    def evaluate(self) -> Evaluation:
        """Score the network as it is used: with `--ema`, its average."""
        state = self.state
        if self._population is not None:
            state = self._population.evaluated(state)
        return self._evaluator(state)

    def _compile(self, steps: int) -> None:
        if steps in self._compiled:
            return
        started = time.perf_counter()
        chunk = self._parallel.chunk_spec(self._feed.spec(steps))
        self._compiled[steps] = self._parallel.compile(
            self._train_steps, self._state, self._constants, chunk
        )
        self.compile_seconds += time.perf_counter() - started
