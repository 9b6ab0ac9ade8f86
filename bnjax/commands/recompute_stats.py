"""A trained run with its population statistics estimated again."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.commands.new_run import check_new_run, write_run
from bnjax.commands.table import format_table
from bnjax.data.pipeline import make_feed
from bnjax.data.sources import Source
from bnjax.population import recompute_batch_stats
from bnjax.training.build import build
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.config import Config
from bnjax.training.errors import USAGE, UserError
from bnjax.training.progress import Loading
from bnjax.training.state import Stream, stream_key
from bnjax.training.trained import open_trained
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
        UserError: a folder is no run or cannot be written, or the network has no
            statistics to estimate.
    """
    if batches < 1:
        raise UserError(f"--batches {batches}: expected 1 or more.", USAGE)
    check_new_run(output, force=force)
    if output.resolve() == workdir.resolve():
        raise UserError(
            f"--output {output} is the run itself. Give another folder.", USAGE
        )
    run = open_trained(workdir, data_dir)
    program = build(run.config, run.source)
    with open_checkpoints(workdir, run.config, read_only=True) as found:
        state, notes = found.restore(program.initial_state())

    def train_call(variables: Any, batch: dict[str, jax.Array]) -> Any:
        return program.model.apply(
            variables,
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": stream_key(state.rng, Stream.NOISE)},
        )

    try:
        batch_stats = recompute_batch_stats(
            train_call,
            {"params": state.params, "batch_stats": state.batch_stats},
            _training_batches(run.config, run.source, batches),
            method=method,
            layers=layers or None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    write_run(
        output,
        read_json(workdir / CONFIG).get("preset", ""),
        dataclasses.replace(run.config, workdir=output),
        dataclasses.replace(state, batch_stats=batch_stats),
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
    print(describe_change(state.batch_stats, batch_stats))
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


def _training_batches(
    config: Config, source: Source, count: int
) -> Iterator[dict[str, jax.Array]]:
    """Give the batches of the first steps of a run, as its steps were given them."""
    rng = jax.random.key(config.seed)
    report = Loading(source.name)
    feed = make_feed(
        config,
        source,
        lambda epoch: stream_key(rng, Stream.ORDER, epoch),
        report=report,
    )
    try:
        make = jax.jit(feed.batch)
        constants = jax.device_put(feed.constants)
        seen = Loading(source.name, seconds=5, verb="estimating from")
        for step in range(count):
            item = jax.tree.map(lambda leaf: leaf[0], feed.chunk(step, 1))
            yield make(constants, item, stream_key(rng, Stream.AUGMENT, step))
            done = (step + 1) * config.batch_size
            seen(done, count * config.batch_size)
    finally:
        feed.close()
