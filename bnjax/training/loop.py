"""Training from a configuration to a summary: read it from top to bottom."""

import contextlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.data.blocks import load_test
from bnjax.data.pipeline import make_feed
from bnjax.data.sources import Source, open_data
from bnjax.training.build import build
from bnjax.training.checkpoint import Checkpoints, Notes, open_checkpoints
from bnjax.training.config import Config
from bnjax.training.description import check_same, describe
from bnjax.training.errors import USAGE, Stopped, UserError
from bnjax.training.evaluation import Evaluation, Evaluator
from bnjax.training.hosts import ending_together, host_folder, join_hosts
from bnjax.training.layouts import Spmd
from bnjax.training.metrics import (
    MetricsWriter,
    Record,
    TestRecord,
    read_metrics,
    train_record,
)
from bnjax.training.nonfinite import Guard, forward_order
from bnjax.training.optimizer import make_schedule
from bnjax.training.parallel import make_parallel
from bnjax.training.progress import Loading, Progress, make_progress
from bnjax.training.signals import StopSignals
from bnjax.training.state import Stream, TrainState, stream_key
from bnjax.training.summary import final_table, summarize
from bnjax.training.tensorboard import TensorBoard
from bnjax.training.tracing import SecondCall, keep_compiled
from bnjax.training.workdir import (
    CONFIG,
    SUMMARY,
    claim,
    default_workdir,
    write_json,
)


def train(preset: str, config: Config) -> dict[str, Any]:
    """Train, evaluate, and write the run to its folder.

    Args:
        preset: the preset's name, for the folder's name and the record.
        config: what to do, validated.

    Returns:
        What is written to summary.json.

    Raises:
        UserError: something the person who asked for the run can put right.
        Stopped: a signal came; the run was saved.
    """
    join_hosts(config.hosts)
    with ending_together(), host_folder(config) as own:
        return _train(preset, own)


def _train(preset: str, config: Config) -> dict[str, Any]:
    """Train on this host, connected with the others if there are any."""
    if config.compilation_cache is not None:
        keep_compiled(config.compilation_cache)
    source = open_data(config.data, config.data_dir)
    check_batch_size(config, source)
    parallel = make_parallel(config)
    workdir = config.workdir or default_workdir(preset)
    resuming = claim(workdir, resume=config.resume)
    if resuming:
        check_same(workdir, preset, config)
    run = Run(config, source, parallel)
    if not resuming:
        write_json(workdir / CONFIG, describe(preset, config))
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        checkpoints = stack.enter_context(open_checkpoints(workdir, config))
        if config.resume:
            run.resume(checkpoints)
        metrics = stack.enter_context(MetricsWriter(workdir, run.step))
        board = None
        if config.tensorboard or config.histograms:
            board = stack.enter_context(TensorBoard(workdir, run.step))
        progress = make_progress(config.steps, first=run.step)
        stack.callback(progress.close)
        stop = stack.enter_context(StopSignals())
        evaluation = run.to_the_end(checkpoints, metrics, board, progress, stop)
    summary = summarize(
        run.state,
        evaluation,
        read_metrics(workdir),
        seconds=run.seconds,
        compile_seconds=run.compile_seconds,
        dropped=run.guard.dropped,
        seed=config.seed,
    )
    write_json(workdir / SUMMARY, {"preset": preset, **summary})
    print(f"{evaluation}\n{final_table(summary)}")
    print(f"{workdir} holds the run: python eval.py {workdir}")
    return summary


class Run:
    """A run in memory: its data, its functions, and the state it has come to."""

    def __init__(
        self, config: Config, source: Source, parallel: Spmd | None = None
    ) -> None:
        self.config = config
        self._parallel = parallel = parallel or make_parallel(config)
        program = build(config, source)
        report = Loading(source.name)
        self._state = parallel.place_state(program.initial_state())
        self.step = 0
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self._evaluate = Evaluator(
            program,
            load_test(config.data, source, report),
            config.eval_batch_size,
            parallel,
        )
        rng = jax.random.key(config.seed)
        self._feed = make_feed(
            config,
            source,
            lambda epoch: stream_key(rng, Stream.ORDER, epoch),
            shards=jax.process_count(),
            shard=jax.process_index(),
            report=report,
        )
        self._most_steps = self._feed.chunk_steps if program.scans() else 1
        self._constants = parallel.place(self._feed.constants)
        self._schedule = make_schedule(config)
        images = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.float32)
        self.guard = Guard(
            skip=config.on_nan == "skip",
            layers=lambda: forward_order(program.model, images),
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
            return
        state, notes = checkpoints.restore(self.state)
        self._state = self._parallel.place_state(state)
        self.step = int(state.step)
        self.seconds = notes.seconds
        self.guard.dropped = notes.dropped
        self._feed.restore(notes.feed)
        print(f"resuming at step {self.step:,}", file=sys.stderr)

    def close(self) -> None:
        """End what reads the data."""
        self._feed.close()

    def to_the_end(
        self,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        board: TensorBoard | None,
        progress: Progress,
        stop: StopSignals,
    ) -> Evaluation:
        """Take every step that is left; return the evaluation after the last.

        Raises:
            UserError: the loss is not finite, or the disk is full.
            Stopped: a signal came; the run was saved.
        """
        config = self.config
        every = (config.log_every, config.eval_every, config.checkpoint_every)
        tracing = SecondCall(checkpoints.workdir if config.profile else None)
        evaluation = None
        while self.step < config.steps:
            until = min(config.steps, *(next_multiple(self.step, n) for n in every))
            with tracing():
                taken, seconds = self.dispatch(until - self.step)
            self._stop_on(self.guard.check(self.step, taken), checkpoints)
            record = train_record(
                taken, self.step, self.guard.dropped, seconds, self._schedule
            )
            records: list[Record] = [] if record is None else [record]
            evaluation = None
            done = self.step == config.steps
            if done or self.step % config.eval_every == 0:
                evaluation = self._evaluate(self.state)
                if not np.isfinite(evaluation.loss):
                    problem = f"the test loss is {evaluation.loss} after step "
                    self._stop_on(f"{problem}{self.step:,}.", checkpoints)
                test = TestRecord(self.step, evaluation.loss, evaluation.accuracy)
                records.append(test)
                progress.test(test)
                if board is not None and config.histograms:
                    board.histograms(self.step, self.state)
            for each in records:
                metrics.write(each)
                if board is not None:
                    board.write(each)
            if record is not None:
                progress.train(record)
            checkpoints.check()
            signal = None if done else stop.requested()
            if done or signal or self.step % config.checkpoint_every == 0:
                metrics.sync()
                accuracy = evaluation.accuracy if evaluation else None
                place, dropped = self._feed.state(), self.guard.dropped
                notes = Notes(accuracy, place, self.seconds, dropped)
                checkpoints.save(self.state, notes)
            if signal:
                checkpoints.wait()
                raise Stopped(
                    f"stopped by {signal.name} after step {self.step:,}. "
                    f"{checkpoints.last_good()} The same command with --workdir "
                    f"{checkpoints.workdir} --resume continues it.",
                    128 + signal,
                )
        checkpoints.wait()
        return evaluation or self._evaluate(self.state)

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

    def _stop_on(self, problem: str | None, checkpoints: Checkpoints) -> None:
        """Stop where there is a problem: numbers that nothing can be learned from."""
        if problem is not None:
            checkpoints.wait()
            raise UserError(
                f"{problem} {checkpoints.last_good()} Try a --learning-rate below "
                f"{self.config.learning_rate:g}."
            )

    def _compile(self, steps: int) -> None:
        if steps in self._compiled:
            return
        started = time.perf_counter()
        chunk = self._parallel.chunk_spec(self._feed.spec(steps))
        self._compiled[steps] = self._parallel.compile(
            self._train_steps, self._state, self._constants, chunk
        )
        self.compile_seconds += time.perf_counter() - started


def next_multiple(step: int, every: int) -> int:
    """Return the first multiple of `every` beyond `step`.

    Example:
        >>> next_multiple(0, 100), next_multiple(100, 100), next_multiple(150, 100)
        (100, 200, 200)
    """
    return (step // every + 1) * every


def check_batch_size(config: Config, source: Source) -> None:
    """Refuse a batch that the training set cannot fill."""
    examples = source.sizes["train"]
    if config.batch_size > examples:
        raise UserError(
            f"--batch-size {config.batch_size}: {source.name} has {examples} training "
            f"examples; expected at most that many.",
            USAGE,
        )
