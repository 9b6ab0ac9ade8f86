"""Training from a configuration to a summary: read it from top to bottom."""

import contextlib
import dataclasses
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.data.blocks import load_test
from bnjax.data.config import SettingError
from bnjax.data.sources import Source, absolute_name, open_data
from bnjax.training.checkpoint import CheckpointMetadata, Checkpoints, open_checkpoints
from bnjax.training.config import Config
from bnjax.training.evaluation import (
    Evaluation,
    Evaluator,
    InputRecorder,
    PopulationEstimator,
    average_needs_stats,
    average_params,
)
from bnjax.training.faults import (
    DivergedError,
    NonFiniteGuard,
    Stopped,
    StopSignals,
    forward_order,
)
from bnjax.training.hosts import (
    check_hosts_agree,
    failing_together,
    host_folder,
    join_hosts,
    settings,
)
from bnjax.training.metrics import (
    EvalRecord,
    MetricsWriter,
    ProgressBar,
    ProgressReporter,
    Record,
    layer_record,
    read_metrics,
    train_record,
)
from bnjax.training.optimizer import make_schedule
from bnjax.training.program import Program, make_run_feed
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
    read_record,
    write_json,
    writing,
)


def train(preset: str, config: Config) -> dict[str, Any]:
    """Train, evaluate, and write the run to its folder.

    Args:
        preset: the name for the folder and the record.
        config: the configuration.

    Returns:
        The contents of summary.json.
    """
    join_hosts(config.hosts)
    with failing_together(), host_folder(config) as config_here:
        return _train(preset, config_here)


def _train(preset: str, config: Config) -> dict[str, Any]:
    """Train on this host, connected with the other hosts if there are any."""
    check_hosts_agree(settings(preset, config))
    if config.compilation_cache is not None:
        keep_compiled(config.compilation_cache)
    # The absolute name lets a run find its folder of images from any directory.
    config = dataclasses.replace(config, data=absolute_name(config.data))
    source = open_data(config.data, config.data_dir)
    described = describe(preset, config, source)
    examples = source.sizes["train"]
    if config.batch_size > examples:
        raise SettingError(
            f"--batch-size {config.batch_size}: {source.name} has {examples} training "
            "examples; expected at most that many."
        )
    parallel = make_parallel(config)
    workdir = config.workdir or default_workdir(preset, config.data.name)
    with contextlib.ExitStack() as stack:
        resuming = stack.enter_context(claim(workdir, resume=config.resume))
        if resuming:
            record = read_record(workdir)
            check_same(workdir, record, described, config)
            # A resumed run may have more --steps.
            described = record | {"config": described["config"]}
        run = Run(config, source, parallel, resuming=resuming)
        stack.callback(run.close)
        write_json(workdir / CONFIG, described)
        checkpoints = stack.enter_context(open_checkpoints(workdir, config))
        if config.resume:
            run.resume(checkpoints)
        if jax.process_count() > 1:
            digest = state_sha256(run.state)
            check_hosts_agree({"first step": run.step, "first state": digest})
        metrics = MetricsWriter(
            workdir, run.step, tensorboard=config.tensorboard or config.histograms
        )
        stack.callback(metrics.close)
        progress = ProgressBar(config.steps, first=run.step)
        stack.callback(progress.close)
        stop = stack.enter_context(StopSignals())
        evaluation = _take_steps(run, checkpoints, metrics, progress, stop)
        summary = summarize(run, evaluation, read_metrics(workdir))
        write_json(workdir / SUMMARY, {"preset": preset, **summary})
    print(f"{evaluation}\n{final_table(summary)}")
    print(f"{workdir} holds the run: python eval.py {shlex.quote(str(workdir))}")
    return summary


class Run:
    """A run in memory: its data, its functions and its current state.

    If `parallel` is None, the configuration determines the layout on devices. If
    `resuming`, a checkpoint will replace the first state.
    """

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
        self.program = program = Program(config, source)
        report = ProgressReporter(source.name)
        # The weights that a resumed run started from may no longer exist.
        first = program.initial_state() if resuming else first_state(config, program)
        self._state = parallel.place_state(first)
        self.step, self.seconds, self.compile_seconds = 0, 0.0, 0.0
        test = load_test(config.data, source, report)
        self._evaluator = Evaluator(program, test, config.eval_batch_size, parallel)
        self._recorder = None
        if config.record_inputs:
            self._recorder = InputRecorder(program, test, config.eval_batch_size)
        hosts, host = jax.process_count(), jax.process_index()
        self._feed = make_run_feed(
            config, source, shards=hosts, shard=host, report=report
        )
        self._max_steps = self._feed.chunk_steps if program.scans else 1
        self._constants = parallel.place(self._feed.constants)
        self._feeds, self._estimator = [self._feed], None
        if average_needs_stats(config):
            constants = self._constants
            if hosts > 1:
                self._feeds.append(make_run_feed(config, source))
                constants = None
            self._estimator = PopulationEstimator(
                config, program, self._feeds[-1], parallel, constants
            )
        self.guard = NonFiniteGuard(
            skip=config.on_nan == "skip",
            layers=lambda: forward_order(program.model, program.images),
        )
        self._train_steps = parallel.train_steps(
            program.train_step(parallel), self._feed.batch
        )
        self._compiled = {}

    @property
    def state(self) -> TrainState:
        """One copy of the state, as in a checkpoint."""
        return self._parallel.host_state(self._state)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Continue from the newest checkpoint, or from the start if there is none."""
        if not checkpoints.steps():
            print("no checkpoint to resume from: starting at step 0", file=sys.stderr)
            first = first_state(self.config, self.program)
            self._state = self._parallel.place_state(first)
            return
        state, metadata = checkpoints.restore(self.state)
        self._state = self._parallel.place_state(state)
        self.step, self.seconds = int(state.step), metadata.seconds
        self.guard.dropped = metadata.dropped
        self._feed.restore(metadata.feed)
        print(f"resuming at step {self.step:,}", file=sys.stderr)

    def metadata(self, accuracy: float | None) -> CheckpointMetadata:
        """Return the values of a checkpoint beside the state."""
        place, dropped = self._feed.state(), self.guard.dropped
        return CheckpointMetadata(accuracy, place, self.seconds, dropped)

    def dispatch(self, steps: int) -> tuple[dict[str, np.ndarray], float]:
        """Take steps; return the metrics of `train_step` for each, and the seconds.

        The time includes drawing the examples and waiting for the losses, but not
        compilation.
        """
        limit = self._max_steps
        parts = [min(limit, steps - done) for done in range(0, steps, limit)]
        for part in set(parts):
            self._compile(part)
        started = time.perf_counter()
        step_metrics = []
        # The device works on one part while the host draws the next.
        for part in parts:
            chunk = self._parallel.place_chunk(self._feed.chunk(self.step, part))
            take = self._compiled[part]
            self._state, metrics = take(self._state, self._constants, chunk)
            step_metrics.append(metrics)
            self.step += part
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *step_metrics)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return joined, seconds

    def evaluate(self) -> Evaluation:
        """Score the network; with `--ema`, its average."""
        state = average_params(self.config, self.state)
        if self._estimator is not None:
            # The averaged parameters have no statistics yet.
            state = self._estimator.estimate(state)
        return self._evaluator(state)

    def inputs(self) -> dict[str, np.ndarray]:
        """Return some inputs of each nonlinearity, if they are recorded."""
        return {} if self._recorder is None else self._recorder(self.state)

    def close(self) -> None:
        """Close the feed."""
        for feed in self._feeds:
            feed.close()

    def _compile(self, steps: int) -> None:
        if steps in self._compiled:
            return
        started = time.perf_counter()
        chunk = self._parallel.chunk_spec(self._feed.spec(steps))
        self._compiled[steps] = self._parallel.compile(
            self._train_steps, self._state, self._constants, chunk
        )
        self.compile_seconds += time.perf_counter() - started


def _take_steps(
    run: Run,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    progress: ProgressBar,
    stop: StopSignals,
) -> Evaluation:
    """Take the remaining steps, and return the evaluation after the last step."""
    config = run.config
    every = (config.log_every, config.eval_every, config.checkpoint_every)
    schedule = make_schedule(config)
    evaluation, dispatches = None, 0
    while run.step < config.steps:
        until = min(config.steps, *(run.step // n * n + n for n in every))
        dispatches += 1
        profile = contextlib.nullcontext()
        if config.profile and dispatches == 2:  # The first dispatch is a warm-up.
            profile = jax.profiler.trace(checkpoints.workdir / PROFILE)
        with profile:
            step_metrics, seconds = run.dispatch(until - run.step)
        _stop_on(run.guard.check(run.step, step_metrics), checkpoints, config)
        record = train_record(
            step_metrics, run.step, run.guard.dropped, seconds, schedule
        )
        records: list[Record] = [] if record is None else [record]
        evaluation, done = None, run.step == config.steps
        if done or run.step % config.eval_every == 0:
            evaluation = run.evaluate()
            if not np.isfinite(evaluation.loss):
                problem = f"the test loss is {evaluation.loss} after step "
                _stop_on(f"{problem}{run.step:,}.", checkpoints, config)
            test = EvalRecord(run.step, evaluation.loss, evaluation.accuracy)
            records.append(test)
            metrics.write_layers(layer_record(run.step, run.state, run.inputs()))
            if config.histograms:
                metrics.histograms(run.step, run.state)
        for each in records:
            metrics.write(each)
        # A line of training also shows the latest evaluation.
        for each in reversed(records):
            progress.show(each)
        checkpoints.check()
        signal = None if done else stop.requested()
        if done or signal or run.step % config.checkpoint_every == 0:
            metrics.sync()
            accuracy = evaluation.accuracy if evaluation else None
            checkpoints.save(run.state, run.metadata(accuracy))
        if signal:
            checkpoints.wait()
            raise Stopped(
                f"stopped by {signal.name} after step {run.step:,}. "
                f"{checkpoints.last_good()} The same command with --workdir "
                f"{shlex.quote(str(checkpoints.workdir))} --resume continues it.",
                signal,
            )
    checkpoints.wait()
    return evaluation or run.evaluate()


def _stop_on(problem: str | None, checkpoints: Checkpoints, config: Config) -> None:
    """Stop the run if there is a problem."""
    if problem is not None:
        checkpoints.wait()
        raise DivergedError(
            f"{problem} {checkpoints.last_good()} Try a --learning-rate below "
            f"{config.learning_rate:g}."
        )


def summarize(
    run: Run, evaluation: Evaluation, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the contents of summary.json, from all records of a finished run."""
    tests = [record for record in records if record["split"] == "test"]
    best = max(tests, key=lambda test: (test["accuracy"], test["step"]))
    state, names = run.state, ("accuracy", "loss", "correct", "examples")
    return {
        **{f"test_{name}": getattr(evaluation, name) for name in names},
        "best_test_accuracy": best["accuracy"],
        "best_step": best["step"],
        "steps": run.step,
        "dropped_steps": run.guard.dropped,
        "steps_per_second": run.step / run.seconds,
        "train_seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "parameters": count_parameters(state.params),
        "state_sha256": state_sha256(state),
        "seed": run.config.seed,
    }


def final_table(summary: dict[str, Any]) -> str:
    """Return the rest of a summary as a table for people."""
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


def keep_compiled(folder: Path) -> None:
    """Let JAX keep every compiled program in a folder, and reuse it from there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
