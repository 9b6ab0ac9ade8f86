"""Training from a configuration to a summary: read it from top to bottom."""

import contextlib
from typing import Any

import numpy as np

from bnjax.data.sources import Source, open_data
from bnjax.training.checkpoint import Checkpoints, Notes, open_checkpoints
from bnjax.training.config import Config
from bnjax.training.description import check_same, describe
from bnjax.training.errors import USAGE, DivergedError, Stopped, UserError
from bnjax.training.evaluation import Evaluation
from bnjax.training.hosts import ending_together, host_folder, join_hosts
from bnjax.training.metrics import (
    MetricsWriter,
    Record,
    TestRecord,
    read_metrics,
    train_record,
)
from bnjax.training.optimizer import make_schedule
from bnjax.training.parallel import make_parallel
from bnjax.training.progress import Progress, make_progress
from bnjax.training.run import Run
from bnjax.training.signals import StopSignals
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
        UserError: the disk is full.
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
                128 + signal,
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
        raise UserError(
            f"--batch-size {config.batch_size}: {source.name} has {examples} training "
            f"examples; expected at most that many.",
            USAGE,
        )
