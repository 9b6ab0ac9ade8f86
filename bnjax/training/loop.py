"""Training from a configuration to a summary: read it from top to bottom."""

import platform
import time
from typing import Any

import flax
import jax
import numpy as np

import bnjax
from bnjax.data.resident import EpochOrder
from bnjax.data.sources import Source, open_source
from bnjax.training.build import build
from bnjax.training.checkpoint import Checkpoints, open_checkpoints
from bnjax.training.config import Config
from bnjax.training.errors import INTERRUPTED, USAGE, UserError, interrupts_held
from bnjax.training.evaluation import Evaluation, Evaluator
from bnjax.training.metrics import MetricsWriter, TestRecord, TrainRecord
from bnjax.training.optimizer import make_schedule
from bnjax.training.parallel import make_train_steps
from bnjax.training.progress import Loading, Progress, make_progress
from bnjax.training.record import to_json
from bnjax.training.state import (
    Stream,
    count_parameters,
    state_sha256,
    stream_key,
)
from bnjax.training.step import make_train_step
from bnjax.training.workdir import CONFIG, SUMMARY, claim, default_workdir, write_json


def train(preset: str, config: Config) -> dict[str, Any]:
    """Train, evaluate, and write the run to its folder.

    Args:
        preset: the preset's name, for the folder's name and the record.
        config: what to do, validated.

    Returns:
        What is written to summary.json.

    Raises:
        UserError: something the person who asked for the run can put right.
    """
    source = open_source(config.data.name, config.data_dir)
    check_batch_size(config, source)
    workdir = config.workdir or default_workdir(preset)
    claim(workdir)
    run = Run(config, source)
    write_json(workdir / CONFIG, describe(preset, config))
    progress = make_progress(config.steps)
    with (
        open_checkpoints(workdir, config) as checkpoints,
        MetricsWriter(workdir) as metrics,
    ):
        try:
            evaluation = run.to_the_end(checkpoints, metrics, progress)
        except KeyboardInterrupt:
            raise UserError(
                f"interrupted in step {run.step:,}. {checkpoints.last_good()}",
                INTERRUPTED,
            ) from None
        finally:
            progress.close()
    summary = summarize(run, evaluation)
    write_json(workdir / SUMMARY, {"preset": preset, **summary})
    print(f"{evaluation}\n{workdir} holds the run: python eval.py {workdir}")
    return summary


class Run:
    """A run in memory: its data, its functions, and the state it has come to."""

    def __init__(self, config: Config, source: Source) -> None:
        self.config = config
        program = build(config, source)
        report = Loading(source.name)
        self.state = program.initial_state()
        self.step = 0
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self._arrays = jax.device_put(source.load("train", report))
        self._evaluate = Evaluator(
            program, source.load("test", report), config.eval_batch_size
        )
        self._order = EpochOrder(
            lambda epoch: stream_key(self.state.rng, Stream.ORDER, epoch),
            source.sizes["train"],
            config.batch_size,
        )
        self._schedule = make_schedule(config)
        self._train_steps = make_train_steps(
            make_train_step(program.model, program.optimizer), program.gather
        )
        self._compiled = {}

    def to_the_end(
        self, checkpoints: Checkpoints, metrics: MetricsWriter, progress: Progress
    ) -> Evaluation:
        """Take every step; return the evaluation after the last."""
        config = self.config
        every = (config.log_every, config.eval_every, config.checkpoint_every)
        while True:
            stop = min(config.steps, *(next_multiple(self.step, n) for n in every))
            record, losses = self.dispatch(stop - self.step)
            self._check_finite(losses, checkpoints)
            metrics.write(record)
            evaluation = None
            done = self.step == config.steps
            if done or self.step % config.eval_every == 0:
                evaluation = self._evaluate(self.state)
                test = TestRecord(self.step, evaluation.loss, evaluation.accuracy)
                metrics.write(test)
                progress.test(test)
            progress.train(record)
            if done or self.step % config.checkpoint_every == 0:
                with interrupts_held():
                    checkpoints.save(self.state)
            if done and evaluation is not None:
                return evaluation

    def dispatch(self, steps: int) -> tuple[TrainRecord, np.ndarray]:
        """Take some steps in one call to the device.

        The time is taken from drawing the examples to having the losses; compiling
        is done before it starts.

        Args:
            steps: how many.

        Returns:
            What they amount to, and the loss of each, shape (steps,).
        """
        self._compile(steps)
        started = time.perf_counter()
        rows = self._order.rows(self.step, steps)
        self.state, scores = self._compiled[steps](self.state, self._arrays, rows)
        losses, accuracies = np.asarray(scores["loss"]), np.asarray(scores["accuracy"])
        seconds = time.perf_counter() - started
        self.step += steps
        self.seconds += seconds
        record = TrainRecord(
            step=self.step,
            loss=float(losses.mean(dtype=np.float64)),
            accuracy=float(accuracies.mean(dtype=np.float64)),
            learning_rate=float(np.asarray(self._schedule(self.step - 1))),
            steps_per_second=steps / seconds,
        )
        return record, losses

    def _check_finite(self, losses: np.ndarray, checkpoints: Checkpoints) -> None:
        """Stop at the first loss that is no number to learn from."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            step = self.step - losses.size + int(bad[0]) + 1
            raise UserError(
                f"the loss became {losses[bad[0]]} in step {step:,}. "
                f"{checkpoints.last_good()} Try a --learning-rate below "
                f"{self.config.learning_rate:g}."
            )

    def _compile(self, steps: int) -> None:
        if steps in self._compiled:
            return
        started = time.perf_counter()
        self._order.rows(self.step, 1)
        rows = jax.ShapeDtypeStruct((steps, self.config.batch_size), np.int32)
        lowered = self._train_steps.lower(self.state, self._arrays, rows)
        self._compiled[steps] = lowered.compile()
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


def describe(preset: str, config: Config) -> dict[str, Any]:
    """Return what config.json holds: all that the run is a function of."""
    return {
        "preset": preset,
        "config": to_json(config),
        "versions": {
            "bnjax": bnjax.__version__,
            "flax": flax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
    }


def summarize(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """Return what summary.json holds, beside the preset."""
    return {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_correct": evaluation.correct,
        "test_examples": evaluation.examples,
        "steps": run.step,
        "steps_per_second": run.step / run.seconds,
        "train_seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "parameters": count_parameters(run.state.params),
        "state_sha256": state_sha256(run.state),
        "seed": run.config.seed,
    }
