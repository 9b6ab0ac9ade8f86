"""Trained runs, opened from their folders and evaluated, alone or as an ensemble."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnjax.data.blocks import load_test
from bnjax.data.crops import crop_blocks
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import Source, open_data
from bnjax.training.build import Program, build
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.config import Config
from bnjax.training.description import read_config
from bnjax.training.ensemble import Predictor, evaluate_crops
from bnjax.training.errors import USAGE, UserError
from bnjax.training.evaluation import Evaluation, Evaluator
from bnjax.training.layouts import Spmd
from bnjax.training.parallel import evaluation_parallel
from bnjax.training.progress import Loading
from bnjax.training.state import TrainState
from bnjax.training.workdir import (
    CHECKPOINTS,
    EVALUATION,
    SUMMARY,
    read_json,
    write_json,
)


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


def evaluate_runs(
    workdirs: Sequence[Path],
    *,
    crops: int = 1,
    output: Path | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or of several as an ensemble.

    Args:
        workdirs: one or more folders that train.py wrote.
        crops: of each image: 1, 10 or 144, see `bnjax.data.crops.boxes`.
        output: where the result is written; eval.json in the only workdir if None, and
            nowhere for an ensemble.
        data_dir: where tfds data sets are, if no longer where the runs found them.

    Returns:
        The result: scores, crops and step, or in place of the step the members.

    Raises:
        UserError: a folder is no run or something in it is damaged, the runs do not
            make an ensemble, or the crops cannot be had.
    """
    _check(workdirs, output)
    runs = [open_trained(workdir, data_dir) for workdir in workdirs]
    _check_agreement(runs)
    source, alone = runs[0].source, len(runs) == 1
    blocks = crop_blocks(source, crops)
    opened = [run.restore() for run in runs]
    parallel = evaluation_parallel(runs[0].config).for_evaluation()
    if alone and crops == 1:
        [(run, program, state)] = [(runs[0], *opened[0])]
        test = load_test(run.config.data, source, Loading(source.name))
        size = run.config.eval_batch_size
        ensemble = Evaluator(program, test, size, parallel)(state)
        members = [ensemble]
    else:
        predictors = [
            Predictor(
                program.model,
                make_to_inputs(run.config.data, source.max_value),
                state,
                parallel,
            )
            for run, (program, state) in zip(runs, opened, strict=True)
        ]
        size = _batch_size(runs, crops, parallel)
        report = Loading(source.name, seconds=10, verb="scoring")
        members, ensemble = evaluate_crops(predictors, blocks, size, report)
    scored = [
        (run, int(state.step), evaluation)
        for run, (_, state), evaluation in zip(runs, opened, members, strict=True)
    ]
    for run, step, evaluation in scored:
        _check_finite(run, evaluation)
        _compare_with_summary(run.workdir, step)
    taken = f", {crops} crops" if crops > 1 else ""
    result = {**_scores(ensemble), "crops": crops}
    if alone:
        step = scored[0][1]
        result["step"] = step
        output = output or runs[0].workdir / EVALUATION
        text = f"step {step:,}{taken}: {ensemble}"
    else:
        result["members"] = [
            {"workdir": str(run.workdir), "step": step, **_scores(evaluation)}
            for run, step, evaluation in scored
        ]
        lines = [
            f"{run.workdir}, step {step:,}{taken}: {evaluation}"
            for run, step, evaluation in scored
        ]
        text = "\n".join([*lines, f"ensemble of {len(runs)}{taken}: {ensemble}"])
    if output is not None:
        write_json(output, result)
    print(text)
    return result


def _check(workdirs: Sequence[Path], output: Path | None) -> None:
    """Refuse a command line before anything is read."""
    seen = set()
    for workdir in workdirs:
        if workdir.resolve() in seen:
            raise UserError(
                f"{workdir} is named twice, and would count twice in the ensemble. "
                "Name each run once.",
                USAGE,
            )
        seen.add(workdir.resolve())
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        problem = "is a folder" if output.is_dir() else "is in a folder not there"
        raise UserError(
            f"--output {output} {problem}: expected a file to write, in a folder that "
            "exists.",
            USAGE,
        )


def _check_agreement(runs: Sequence[Trained]) -> None:
    """Refuse an ensemble whose members are not given the same images."""
    first = runs[0]
    for other in runs[1:]:
        if first.tested_on() != other.tested_on():
            described = (
                f"{run.workdir} on {run.tested_on()} ({run.source.name}, "
                f"images of {'x'.join(map(str, run.source.image_shape))}, "
                f"{run.source.classes} classes)"
                for run in (first, other)
            )
            raise UserError(
                f"these runs make no ensemble: {' and '.join(described)} are tested. "
                "Expected runs of one data set, test split and size of images. "
                "Evaluate them one by one."
            )


def _batch_size(runs: Sequence[Trained], crops: int, parallel: Spmd) -> int:
    """Return the members' smallest, but no more than there are crops."""
    devices = len(parallel.devices)
    total = crops * runs[0].source.sizes["test"]
    size = min(total, *(run.config.eval_batch_size for run in runs))
    return -(-size // devices) * devices


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as eval.json has it."""
    top5 = {
        "test_top5_accuracy": evaluation.top5_accuracy,
        "test_top5_correct": evaluation.top5_correct,
    }
    return {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_correct": evaluation.correct,
        "test_examples": evaluation.examples,
        **(top5 if evaluation.top5_correct is not None else {}),
    }


def _check_finite(run: Trained, evaluation: Evaluation) -> None:
    """Refuse a network whose outputs are no numbers."""
    if not math.isfinite(evaluation.loss):
        raise UserError(
            f"the network of {run.workdir} has a test loss of {evaluation.loss}: its "
            "outputs overflow. Train again with a lower --learning-rate."
        )


def _compare_with_summary(workdir: Path, step: int) -> None:
    """Say so where the newest checkpoint is not that of the summary."""
    if not (workdir / SUMMARY).exists():
        return
    summary = read_json(workdir / SUMMARY)
    steps = summary.get("steps") if isinstance(summary, dict) else None
    if steps != step:
        print(
            f"note: the newest whole checkpoint of {workdir} is of step {step}, and "
            f"{SUMMARY} of step {steps}.",
            file=sys.stderr,
        )
