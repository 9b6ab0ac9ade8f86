"""A trained run with its population statistics estimated again."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.commands.new_run import check_new_run, write_run
from bnjax.commands.table import format_table
from bnjax.data.config import SettingError
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.config import RunError
from bnjax.training.evaluation import PopulationEstimator, load_run
from bnjax.training.metrics import ProgressReporter
from bnjax.training.program import Program, make_run_feed
from bnjax.training.sharding import evaluation_parallel
from bnjax.training.workdir import CONFIG, read_json


def recompute_run(
    workdir: Path,
    output: Path,
    *,
    batches: int = 100,
    method: Literal["paper", "pooled"] = "paper",
    layers: tuple[str, ...] = (),
    force: bool = False,
    data_dir: Path | None = None,
) -> None:
    """Write a run anew with statistics over batches of its training set.

    The batches are those of the training's first steps, augmented as they were; the
    parameters are those of the newest checkpoint.

    Args:
        workdir: the folder that train.py wrote.
        output: the folder to write.
        batches: how many, of the run's batch size.
        method: see `bnjax.population.recompute_batch_stats`.
        layers: names or patterns of the layers; all if empty.
        force: replace a run that is in `output`.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Raises:
        RunError: a folder is no run or cannot be written, or the network has no
            statistics to estimate.
    """
    if batches < 1:
        raise SettingError(f"--batches {batches}: expected 1 or more.")
    check_new_run(output, force=force)
    if output.resolve() == workdir.resolve():
        raise SettingError(f"--output {output} is the run itself. Give another folder.")
    run = load_run(workdir, data_dir)
    if run.config.ema is not None:
        raise RunError(
            f"{workdir} was trained with --ema: eval.py takes its statistics again "
            "each time, over --batch-stats-from batches."
        )
    program = Program(run.config, run.source)
    with open_checkpoints(workdir, run.config, read_only=True) as found:
        state, notes = found.restore(program.initial_state())
    if not state.batch_stats:
        raise RunError(
            f"{workdir} was trained without batch normalization: it has no statistics."
        )
    parallel = evaluation_parallel(run.config)
    report = ProgressReporter(run.source.name, seconds=5, verb="estimating from")
    with contextlib.closing(make_run_feed(run.config, run.source)) as feed:
        population = PopulationEstimator(run.config, program, feed, parallel)
        new = population.estimate(
            state, batches, method=method, layers=layers or None, report=report
        )
    write_run(
        output,
        read_json(workdir / CONFIG).get("preset", ""),
        dataclasses.replace(run.config, workdir=output),
        new,
        {
            "command": "recompute-stats",
            "run": str(workdir),
            "batches": batches,
            "method": method,
            "layers": layers,
        },
        notes=dataclasses.replace(notes, test_accuracy=None),
        force=force,
    )
    print(describe_change(state.batch_stats, new.batch_stats))
    print(
        f"{output} holds step {int(state.step):,} with statistics over {batches:,} "
        f"batches of {run.config.batch_size:,}: python eval.py {output}"
    )


def describe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    r"""Return a table of how far the statistics of each layer moved.

    .. math:: \max_k |\mu'_k - \mu_k| / \sigma_k, \quad
              \min_k \sigma'^2_k / \sigma^2_k, \quad \max_k \sigma'^2_k / \sigma^2_k

    Args:
        before: a collection "batch_stats".
        after: another of the same structure.

    Example:
        >>> before = {"bn": {"mean": np.zeros(2), "var": np.array([4.0, 1.0])}}
        >>> after = {"bn": {"mean": np.ones(2), "var": np.array([4.0, 3.0])}}
        >>> print(describe_change(before, after))
        layer  mean moved by (std)  var times
        bn                       1     1 to 3
    """
    old, new = (
        {k: np.asarray(v, np.float64) for k, v in flatten_dict(tree).items()}
        for tree in (before, after)
    )
    rows = []
    for path in old:
        spread = (*path[:-1], "var")
        if path[-1] != "mean" or spread not in old:
            continue
        (mean, moved), (var, changed) = ((old[key], new[key]) for key in (path, spread))
        tiny = np.finfo(np.float64).tiny
        ratio = changed / np.maximum(var, tiny)
        distance = np.abs(moved - mean) / np.sqrt(np.maximum(var, tiny))
        rows.append(
            (
                "/".join(path[:-1]) or "(top level)",
                f"{distance.max():.2g}",
                f"{ratio.min():.2g} to {ratio.max():.2g}",
            )
        )
    return format_table(("layer", "mean moved by (std)", "var times"), rows)
