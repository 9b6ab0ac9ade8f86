"""How good a state is on a split: every example scored exactly once."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.data.resident import Arrays, padded_rows
from bnjax.data.sources import open_source
from bnjax.training.build import Program, build
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.errors import UserError
from bnjax.training.parallel import make_eval_steps
from bnjax.training.progress import Loading
from bnjax.training.record import from_json
from bnjax.training.state import TrainState
from bnjax.training.step import make_eval_step
from bnjax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
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
        arrays: the split.
        batch_size: examples at a time; the last batch is padded and masked.
    """

    def __init__(self, program: Program, arrays: Arrays, batch_size: int) -> None:
        examples = len(arrays.labels)
        rows, mask = padded_rows(examples, min(batch_size, examples))
        self._arrays = jax.device_put(arrays)
        self._rows = jax.device_put(rows)
        self._mask = mask
        self._steps = make_eval_steps(make_eval_step(program.model), program.gather)

    def __call__(self, state: TrainState) -> Evaluation:
        """Score one state."""
        scores = self._steps(state.params, state.batch_stats, self._arrays, self._rows)
        losses = np.asarray(scores["loss"], np.float64)[self._mask]
        correct = np.asarray(scores["correct"])[self._mask]
        return Evaluation(float(losses.mean()), int(correct.sum()), losses.size)


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
    config = from_json(_read_config(workdir), str(workdir / CONFIG))
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(
            f"{workdir} has no {CHECKPOINTS}: the run ended before its first one. "
            "Train again in a new --workdir."
        )
    source = open_source(config.data.name, data_dir or config.data_dir)
    program = build(config, source)
    with open_checkpoints(workdir, config, read_only=True) as checkpoints:
        state = checkpoints.restore(program.initial_state())
    arrays = source.load("test", Loading(source.name))
    evaluation = Evaluator(program, arrays, config.eval_batch_size)(state)
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


def _read_config(workdir: Path) -> Any:
    record = read_json(workdir / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(
            f"{workdir / CONFIG} is damaged: it has no 'config'. Restore the file, or "
            "train again."
        )
    return record["config"]
