"""Training from a configuration to a summary: read it from top to bottom."""

import contextlib
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.data.blocks import load_test
from bnjax.data.config import SettingError
from bnjax.data.sources import Source, open_data
from bnjax.training.checkpoint import Checkpoints, Notes, open_checkpoints
from bnjax.training.config import Config
from bnjax.training.evaluation import Evaluation, Evaluator, Population
from bnjax.training.faults import (
    DivergedError,
    Guard,
    Stopped,
    StopSignals,
    forward_order,
)
from bnjax.training.hosts import ending_together, host_folder, join_hosts
from bnjax.training.metrics import (
    Loading,
    MetricsWriter,
    Progress,
    Record,
    TensorBoard,
    TestRecord,
    make_progress,
    read_metrics,
    train_record,
)
from bnjax.training.optimizer import make_schedule
from bnjax.training.program import build, make_run_feed
from bnjax.training.sharding import Spmd, make_parallel
from bnjax.training.step import TrainState, count_parameters, state_sha256
from bnjax.training.transfer import first_state
from bnjax.training.workdir import (
    CONFIG,
    PROFILE,
    SUMMARY,
    check_same,
    claim,
    default_workdir,
    describe,
    write_json,
    writing,
)


def summarize(
    state: TrainState,
    evaluation: Evaluation,
    records: list[dict[str, Any]],
    *,
    seconds: float,
    compile_seconds: float,
    dropped: int,
    seed: int,
) -> dict[str, Any]:
    """Return what summary.json holds, beside the preset.

    Args:
        state: after the last step.
        evaluation: of that state.
        records: all of metrics.jsonl.
        seconds: spent in steps.
        compile_seconds: spent compiling them, since the run was last resumed.
        dropped: steps among them that were dropped.
        seed: of the run.
    """
    steps = int(state.step)
    tests = [record for record in records if record["split"] == "test"]
    best = max(tests, key=lambda test: (test["accuracy"], test["step"]))
    return {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_correct": evaluation.correct,
        "test_examples": evaluation.examples,
        "best_test_accuracy": best["accuracy"],
        "best_step": best["step"],
        "steps": steps,
        "dropped_steps": dropped,
        "steps_per_second": steps / seconds,
        "train_seconds": seconds,
        "compile_seconds": compile_seconds,
        "parameters": count_parameters(state.params),
        "state_sha256": state_sha256(state),
        "seed": seed,
    }


def final_table(summary: dict[str, Any]) -> str:
    """Return the rest of a summary for a person to read.

    Example:
        >>> print(
        ...     final_table(
        ...         {
        ...             "best_test_accuracy": 0.98,
        ...             "best_step": 1500,
        ...             "steps": 2000,
        ...             "steps_per_second": 5000.0,
        ...             "train_seconds": 0.4,
        ...             "compile_seconds": 2.0,
        ...             "parameters": 28010,
        ...             "state_sha256": "0123456789abcdef",
        ...         }
        ...     )
        ... )
        best        98.00 % at step 1,500
        steps       2,000 in 0:00:00, 5,000 steps/s, and 2.0 s to compile
        parameters  28,010
        state       0123456789ab
    """
    best, seconds = summary["best_test_accuracy"], round(summary["train_seconds"])
    rows = {
        "best": f"{100 * best:.2f} % at step {summary['best_step']:,}",
        "steps": (
            f"{summary['steps']:,} in {timedelta(seconds=seconds)}, "
            f"{summary['steps_per_second']:,.0f} steps/s, and "
            f"{summary['compile_seconds']:.1f} s to compile"
        ),
        "parameters": f"{summary['parameters']:,}",
        "state": summary["state_sha256"][:12],
    }
    return "\n".join(f"{name:12}{text}" for name, text in rows.items())


class SecondCall:
    """Traces what happens in the second context it gives: the first meets things cold.

    Args:
        workdir: the folder of the run. None: trace nothing.
    """

    def __init__(self, workdir: Path | None) -> None:
        self._workdir = workdir
        self._calls = 0

    def __call__(self) -> contextlib.AbstractContextManager[object]:
        """Return a context, which traces if it is the second."""
        self._calls += 1
        if self._workdir is None or self._calls != 2:
            return contextlib.nullcontext()
        return jax.profiler.trace(self._workdir / PROFILE)


def keep_compiled(folder: Path) -> None:
    """Have JAX keep every compiled program in a folder, and look for it there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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


def train(preset: str, config: Config) -> dict[str, Any]:
    """Train, evaluate, and write the run to its folder.

    Args:
        preset: the preset's name, for the folder's name and the record.
        config: what to do, validated.

    Returns:
        What is written to summary.json.

    Raises:
        RunError: something the person who asked for the run can put right.
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
    run = Run(config, source, parallel, resuming=resuming)
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
        evaluation = _to_the_end(run, checkpoints, metrics, board, progress, stop)
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


def _to_the_end(
    run: Run,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    board: TensorBoard | None,
    progress: Progress,
    stop: StopSignals,
) -> Evaluation:
    """Take every step that is left; return the evaluation after the last.

    Raises:
        DivergedError: the loss or the state is not finite.
        RunError: the disk is full.
        Stopped: a signal came; the run was saved.
    """
    config = run.config
    every = (config.log_every, config.eval_every, config.checkpoint_every)
    schedule = make_schedule(config)
    tracing = SecondCall(checkpoints.workdir if config.profile else None)
    evaluation = None
    while run.step < config.steps:
        until = min(config.steps, *(next_multiple(run.step, n) for n in every))
        with tracing():
            taken, seconds = run.dispatch(until - run.step)
        _stop_on(run.guard.check(run.step, taken), checkpoints, config)
        record = train_record(taken, run.step, run.guard.dropped, seconds, schedule)
        records: list[Record] = [] if record is None else [record]
        evaluation = None
        done = run.step == config.steps
        if done or run.step % config.eval_every == 0:
            evaluation = run.evaluate()
            if not np.isfinite(evaluation.loss):
                problem = f"the test loss is {evaluation.loss} after step "
                _stop_on(f"{problem}{run.step:,}.", checkpoints, config)
            test = TestRecord(run.step, evaluation.loss, evaluation.accuracy)
            records.append(test)
            progress.test(test)
            if board is not None and config.histograms:
                board.histograms(run.step, run.state)
        for each in records:
            metrics.write(each)
            if board is not None:
                board.write(each)
        if record is not None:
            progress.train(record)
        checkpoints.check()
        signal = None if done else stop.requested()
        if done or signal or run.step % config.checkpoint_every == 0:
            metrics.sync()
            accuracy = evaluation.accuracy if evaluation else None
            place, dropped = run.place_in_data(), run.guard.dropped
            notes = Notes(accuracy, place, run.seconds, dropped)
            checkpoints.save(run.state, notes)
        if signal:
            checkpoints.wait()
            raise Stopped(
                f"stopped by {signal.name} after step {run.step:,}. "
                f"{checkpoints.last_good()} The same command with --workdir "
                f"{checkpoints.workdir} --resume continues it.",
                signal,
            )
    checkpoints.wait()
    return evaluation or run.evaluate()


def _stop_on(problem: str | None, checkpoints: Checkpoints, config: Config) -> None:
    """Stop where there is a problem: numbers that nothing can be learned from."""
    if problem is not None:
        checkpoints.wait()
        raise DivergedError(
            f"{problem} {checkpoints.last_good()} Try a --learning-rate below "
            f"{config.learning_rate:g}."
        )


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
        raise SettingError(
            f"--batch-size {config.batch_size}: {source.name} has {examples} training "
            f"examples; expected at most that many.",
        )
