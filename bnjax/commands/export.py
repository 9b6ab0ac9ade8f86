"""A trained run as a file of StableHLO."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bnjax.commands.fold import fold_state
from bnjax.data.config import SettingError
from bnjax.data.pipeline import make_to_inputs
from bnjax.interop.export import check_export, export_inference, save
from bnjax.training.config import RunError
from bnjax.training.evaluation import load_run


def export_run(
    workdir: Path,
    out: Path,
    *,
    fold: bool = True,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    inputs: Literal["pixels", "floats"] = "pixels",
    softmax: bool = False,
    batch_size: int | None = None,
    force: bool = False,
    data_dir: Path | None = None,
) -> None:
    """Write the network of a run's newest checkpoint as StableHLO.

    Args:
        workdir: the folder that train.py wrote.
        out: the file to write, which ends in .stablehlo.
        fold: fold BN into the layer before it.
        platforms: see `bnjax.interop.export.export_inference`.
        inputs: "pixels": uint8, as the data set stores them; "floats": float32, as
            the network is given them.
        softmax: give probabilities in place of logits.
        batch_size: the only one that it takes; any if None.
        force: replace `out` if it is there.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Raises:
        OutputError: the file cannot be written there.
        SettingError: the batch size is none.
        RunError: the folder is no run, or its network cannot be folded.
        ExportError: it cannot be exported.
    """
    check_export(out, overwrite=force)
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected 1 or more.")
    run = load_run(workdir, data_dir)
    program, state = run.restore()
    to_inputs = make_to_inputs(run.config.data, run.source.max_value)
    if fold and state.batch_stats:
        try:
            network, _ = fold_state(program, state, run.source.image_shape)
        except RunError as error:
            raise RunError(f"{error} Or export it as it is: --no-fold.") from error
    else:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        network = functools.partial(program.model.apply, variables, train=False)

    def inference(images: jax.Array) -> jax.Array:
        logits: Any = network(to_inputs(images) if inputs == "pixels" else images)
        if not softmax:
            return logits
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, "float32")))

    dtype = jnp.uint8 if inputs == "pixels" else jnp.float32
    exported = export_inference(
        inference,
        None,
        jax.ShapeDtypeStruct((1, *run.source.image_shape), dtype),
        platforms=platforms,
        batch_size=batch_size,
    )
    save(exported, out, overwrite=force)
    [given], [result] = exported.in_avals, exported.out_avals
    pixels = f", pixels from 0 to {run.source.max_value}" if inputs == "pixels" else ""
    print(
        f"{out}: {out.stat().st_size:,} bytes, step {int(state.step):,} of {workdir}\n"
        f"takes {given.dtype} of shape {_shape(given.shape)}{pixels}\n"
        f"gives {result.dtype} of shape {_shape(result.shape)}, "
        f"{'probabilities' if softmax else 'logits'}\n"
        f"on {', '.join(exported.platforms)}"
    )


def _shape(sides: Sequence[Any]) -> str:
    return f"({', '.join(map(str, sides))})"
