"""How good a state is on a split: every example scored exactly once."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.data.blocks import Block, SplitBlocks, load_test
from bnjax.data.resident import Arrays, padded_rows
from bnjax.data.sources import open_data
from bnjax.training.build import Program, build
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.description import read_config
from bnjax.training.errors import UserError
from bnjax.training.layouts import Spmd
from bnjax.training.parallel import evaluation_parallel
from bnjax.training.progress import Loading
from bnjax.training.state import TrainState
from bnjax.training.step import make_eval_step
from bnjax.training.workdir import (
    CHECKPOINTS,
    EVALUATION,
    SUMMARY,
    read_json,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores over a whole split.

    Args:
        loss: mean cross-entropy, summed in float64.
        correct: how many examples were classified right.
        examples: how many there are.
    """

    loss: float
    correct: int
    examples: int

    @property
    def accuracy(self) -> float:
        """Return the share classified right, between 0 and 1."""
        return self.correct / self.examples

    def __str__(self) -> str:
        return (
            f"test accuracy {self.accuracy!r} ({self.correct} of {self.examples}), "
            f"test loss {self.loss!r}"
        )


class Evaluator:
    """Scores states on one split.

    Args:
        program: the model and its inputs.
        test: the split, whole or in blocks.
        batch_size: examples at a time; rounded up to a multiple of the devices, and
            the last batch is padded and masked.
        parallel: lays the work out on devices; one device if None.
    """

    def __init__(
        self,
        program: Program,
        test: Arrays | SplitBlocks,
        batch_size: int,
        parallel: Spmd | None = None,
    ) -> None:
        parallel = (parallel or Spmd(jax.local_devices()[:1])).for_evaluation()
        if isinstance(test, SplitBlocks):
            self._blocks, examples = test, test.size
        else:
            examples = len(test.labels)
            self._blocks = [Block(parallel.place(test), np.ones(examples, bool))]
        devices = len(parallel.devices)
        size = -(-min(batch_size, examples) // devices) * devices
        rows, self._mask = padded_rows(examples, size)
        self._parallel = parallel
        self._rows = parallel.place_rows(rows)
        self._steps = parallel.eval_steps(
            make_eval_step(program.model),
            lambda arrays, rows, _: program.gather(arrays, rows),
        )

    def __call__(self, state: TrainState) -> Evaluation:
        """Score one state, as `Spmd.host_state` gives it."""
        params, batch_stats = self._parallel.place((state.params, state.batch_stats))
        losses, correct = [], []
        for arrays, kept in self._blocks:
            # Arrays that are on the devices already stay as they are.
            placed = self._parallel.place(arrays)
            scores = self._steps(params, batch_stats, placed, self._rows)
            loss = np.asarray(scores["loss"], np.float64)
            losses.append(loss[self._mask][kept])
            correct.append(np.asarray(scores["correct"])[self._mask][kept])
        loss, right = np.concatenate(losses), np.concatenate(correct)
        return Evaluation(float(loss.mean()), int(right.sum()), loss.size)


def evaluate_run(workdir: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, from its folder alone.

    Args:
        workdir: the folder that train.py wrote.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Returns:
        What is written to eval.json.

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
    program = build(config, source)
    with open_checkpoints(workdir, config, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(program.initial_state())
    test = load_test(config.data, source, Loading(source.name))
    parallel = evaluation_parallel(config)
    evaluation = Evaluator(program, test, config.eval_batch_size, parallel)(state)
    result = {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_correct": evaluation.correct,
        "test_examples": evaluation.examples,
        "step": int(state.step),
    }
    _compare_with_summary(workdir, int(state.step))
    write_json(workdir / EVALUATION, result)
    print(f"step {int(state.step):,}: {evaluation}")
    return result


def _compare_with_summary(workdir: Path, step: int) -> None:
    """Say so where the newest checkpoint is not that of the summary."""
    if not (workdir / SUMMARY).exists():
        return
    summary = read_json(workdir / SUMMARY)
    steps = summary.get("steps") if isinstance(summary, dict) else None
    if steps != step:
        print(
            f"note: the newest whole checkpoint is of step {step}, and {SUMMARY} of "
            f"step {steps}.",
            file=sys.stderr,
        )
