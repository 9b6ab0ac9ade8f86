"""What eval.py does: trained runs scored, alone or as an ensemble."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnjax.data.blocks import load_test
from bnjax.data.crops import crop_blocks
from bnjax.data.pipeline import make_to_inputs
from bnjax.training.build import Program
from bnjax.training.ensemble import Predictor, evaluate_crops
from bnjax.training.errors import USAGE, UserError
from bnjax.training.evaluation import Evaluation, Evaluator
from bnjax.training.layouts import Spmd
from bnjax.training.parallel import evaluation_parallel
from bnjax.training.progress import Loading
from bnjax.training.state import TrainState
from bnjax.training.trained import Statistics, Trained, open_trained
from bnjax.training.workdir import EVALUATION, SUMMARY, read_json, write_json


def evaluate_runs(
    workdirs: Sequence[Path],
    *,
    crops: int = 1,
    batch_stats_from: int | None = None,
    output: Path | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or of several as an ensemble.

    Args:
        workdirs: one or more folders that train.py wrote.
        crops: of each image: 1, 10 or 144, see `bnjax.data.crops.boxes`.
        batch_stats_from: evaluate twice: with the moving averages of training, and with
            population statistics over so many training batches.
        output: where the result is written; eval.json in the only workdir if None, and
            nowhere for an ensemble.
        data_dir: where tfds data sets are, if no longer where the runs found them.

    Returns:
        The result: scores, crops and step, or in place of the step the members. With
        `batch_stats_from`, also that of each kind of statistics, by its name.

    Raises:
        UserError: a folder is no run or something in it is damaged, the runs do not
            make an ensemble, or the crops cannot be had.
    """
    _check(workdirs, output, batch_stats_from)
    runs = [open_trained(workdir, data_dir) for workdir in workdirs]
    _check_agreement(runs)
    blocks = crop_blocks(runs[0].source, crops)
    opened = [run.restore() for run in runs]
    parallel = evaluation_parallel(runs[0].config).for_evaluation()
    kinds: list[Statistics | None] = [None]
    if batch_stats_from is not None:
        kinds = ["moving_averages", "population"]
    results, lines = {}, []
    for kind in kinds:
        states = [
            run.with_statistics(kind, program, state, parallel, batch_stats_from)
            for run, (program, state) in zip(runs, opened, strict=True)
        ]
        programs = [program for program, _ in opened]
        members, ensemble = _score(runs, programs, states, crops, blocks, parallel)
        for run, evaluation in zip(runs, members, strict=True):
            _check_finite(run, evaluation)
        steps = [int(state.step) for state in states]
        results[kind] = _result(runs, steps, members, ensemble, crops)
        lines += [] if kind is None else [f"{kind.replace('_', ' ')}:"]
        lines += _lines(runs, steps, members, ensemble, crops)
    for run, (_, state) in zip(runs, opened, strict=True):
        _compare_with_summary(run.workdir, int(state.step))
    averages = any(run.config.ema is not None for run in runs)
    result = dict(results[kinds[-1 if averages else 0]])
    if batch_stats_from is not None:
        result |= {"batch_stats_from": batch_stats_from, **results}
    if len(runs) == 1 and output is None:
        output = runs[0].workdir / EVALUATION
    if output is not None:
        write_json(output, result)
    print("\n".join(lines))
    return result


def _score(
    runs: Sequence[Trained],
    programs: Sequence[Program],
    states: Sequence[TrainState],
    crops: int,
    blocks: Any,
    parallel: Spmd,
) -> tuple[list[Evaluation], Evaluation]:
    """Return the scores of each run and of their ensemble."""
    first = runs[0]
    if len(runs) == 1 and crops == 1:
        test = load_test(first.config.data, first.source, Loading(first.source.name))
        size = first.config.eval_batch_size
        evaluation = Evaluator(programs[0], test, size, parallel)(states[0])
        return [evaluation], evaluation
    predictors = [
        Predictor(
            program.model,
            make_to_inputs(run.config.data, first.source.max_value),
            state,
            parallel,
        )
        for run, program, state in zip(runs, programs, states, strict=True)
    ]
    report = Loading(first.source.name, seconds=10, verb="scoring")
    size = _batch_size(runs, crops, parallel)
    return evaluate_crops(predictors, blocks, size, report)


def _result(
    runs: Sequence[Trained],
    steps: Sequence[int],
    members: Sequence[Evaluation],
    ensemble: Evaluation,
    crops: int,
) -> dict[str, Any]:
    """Return what eval.json holds."""
    result = {**_scores(ensemble), "crops": crops}
    if len(runs) == 1:
        return result | {"step": steps[0]}
    return result | {
        "members": [
            {"workdir": str(run.workdir), "step": step, **_scores(evaluation)}
            for run, step, evaluation in zip(runs, steps, members, strict=True)
        ]
    }


def _lines(
    runs: Sequence[Trained],
    steps: Sequence[int],
    members: Sequence[Evaluation],
    ensemble: Evaluation,
    crops: int,
) -> list[str]:
    """Return what is printed of a result."""
    taken = f", {crops} crops" if crops > 1 else ""
    if len(runs) == 1:
        return [f"step {steps[0]:,}{taken}: {ensemble}"]
    lines = [
        f"{run.workdir}, step {step:,}{taken}: {evaluation}"
        for run, step, evaluation in zip(runs, steps, members, strict=True)
    ]
    return [*lines, f"ensemble of {len(runs)}{taken}: {ensemble}"]


def _check(
    workdirs: Sequence[Path], output: Path | None, batch_stats_from: int | None
) -> None:
    """Refuse a command line before anything is read."""
    if batch_stats_from is not None and batch_stats_from < 1:
        raise UserError(
            f"--batch-stats-from {batch_stats_from}: expected the number of training "
            "batches to take statistics over, 1 or more.",
            USAGE,
        )
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
