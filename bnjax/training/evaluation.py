"""How good a state is on a split: every example scored exactly once."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from bnjax.data.blocks import Block, SplitBlocks
from bnjax.data.resident import Arrays, padded_rows
from bnjax.training.build import Program
from bnjax.training.layouts import Spmd
from bnjax.training.state import TrainState
from bnjax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores over a whole split.

    Args:
        loss: mean cross-entropy, summed in float64.
        correct: how many examples were classified right.
        examples: how many there are.
        top5_correct: how many had their class among the five most probable; None where
            there are no more than five.

    Example:
        >>> evaluation = Evaluation(loss=0.5, correct=3, examples=4, top5_correct=4)
        >>> evaluation.accuracy, evaluation.top5_accuracy
        (0.75, 1.0)
    """

    loss: float
    correct: int
    examples: int
    top5_correct: int | None = None

    @property
    def accuracy(self) -> float:
        """Return the share classified right, between 0 and 1."""
        return self.correct / self.examples

    @property
    def top5_accuracy(self) -> float | None:
        """Return the share right among the first five, between 0 and 1, or None."""
        if self.top5_correct is None:
            return None
        return self.top5_correct / self.examples

    def __str__(self) -> str:
        top5 = ""
        if self.top5_correct is not None:
            top5 = f"top-5 {self.top5_accuracy!r} ({self.top5_correct}), "
        return (
            f"test accuracy {self.accuracy!r} ({self.correct} of {self.examples}), "
            f"{top5}test loss {self.loss!r}"
        )


def evaluation_of(scores: Sequence[Mapping[str, np.ndarray]]) -> Evaluation:
    """Sum up the scores of examples, as `make_eval_step` gives them, part by part."""
    joined = {
        name: np.concatenate([part[name] for part in scores]) for name in scores[0]
    }
    return Evaluation(
        loss=float(joined["loss"].astype(np.float64).mean()),
        correct=int(joined["correct"].sum()),
        examples=len(joined["loss"]),
        top5_correct=int(joined["top5"].sum()) if "top5" in joined else None,
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
        parts = []
        for arrays, kept in self._blocks:
            # Arrays that are on the devices already stay as they are.
            placed = self._parallel.place(arrays)
            scores = self._steps(params, batch_stats, placed, self._rows)
            parts.append({n: np.asarray(scores[n])[self._mask][kept] for n in scores})
        return evaluation_of(parts)
