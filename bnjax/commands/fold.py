"""The weights of a trained run with batch normalization folded into them."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnjax._files import check_output, write_output
from bnjax._validate import did_you_mean
from bnjax.data.config import SettingError
from bnjax.folding import Folded, fold_batch_norm
from bnjax.interop.torch_files import write_state_dict
from bnjax.training.config import RunError
from bnjax.training.evaluation import load_run
from bnjax.training.program import Program
from bnjax.training.step import TrainState

SUFFIXES = (".npz", ".safetensors")
EXAMPLES = 16


def fold_run(
    workdir: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    force: bool = False,
    data_dir: Path | None = None,
) -> None:
    """Write the folded weights of a run's newest checkpoint, and what was folded.

    Args:
        workdir: the folder that train.py wrote.
        out: the file for the weights, .npz or .safetensors; the report goes beside it,
            with the ending .json.
        dtype: of the weights; those of the network if None.
        force: replace files that are there.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Raises:
        RunError: the folder is no run, its network has nothing to fold, or a file
            cannot be written.
    """
    _check_suffix(out)
    beside = out.with_suffix(".json")
    for path in (out, beside):
        check_output(path, overwrite=force)
    run = load_run(workdir, data_dir)
    program, state = run.restore()
    folded, difference = fold_state(program, state, run.source.image_shape, dtype)
    weights = {
        "/".join(path): np.asarray(leaf)
        for path, leaf in flatten_dict(folded.variables).items()
    }
    described = {
        "workdir": str(workdir),
        "step": int(state.step),
        "largest_difference": difference,
        "weights": {
            name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
            for name, leaf in weights.items()
        },
        "layers": [dataclasses.asdict(layer) for layer in folded.report],
    }
    if out.suffix == ".npz":
        write_output(out, _npz(out, weights), overwrite=force)
    else:
        write_state_dict(out, weights, overwrite=force)
    report = json.dumps(described, indent=2) + "\n"
    write_output(beside, report.encode(), overwrite=force)
    print(
        f"{folded.report}\n"
        f"{out}: {len(weights)} arrays, {out.stat().st_size:,} bytes, "
        f"step {int(state.step):,} of {workdir}\n"
        f"logits of {EXAMPLES} random inputs differ by at most {difference:.2g}"
    )


def fold_state(
    program: Program, state: TrainState, image_shape: tuple[int, ...], dtype: Any = None
) -> tuple[Folded, float]:
    """Fold a network, and compare it with what it was.

    Args:
        program: of the run.
        state: of the network.
        image_shape: of one input.
        dtype: of the folded weights; those of the network if None.

    Returns:
        The folded network, and the largest difference between its logits and those
        from before, on random inputs.

    Raises:
        RunError: it cannot be folded.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def apply(variables: Any, x: jax.Array) -> Any:
        return program.model.apply(variables, x, train=False)

    x = jax.random.uniform(jax.random.key(0), (EXAMPLES, *image_shape))
    try:
        folded = fold_batch_norm(apply, variables, x, dtype=dtype and jnp.dtype(dtype))
    except ValueError as error:
        raise RunError(f"the network cannot be folded: {error}") from error
    before, after = (
        np.float64(logits) for logits in (jax.jit(apply)(variables, x), folded(x))
    )
    return folded, float(np.abs(before - after).max())


def _npz(out: Path, weights: dict[str, np.ndarray]) -> bytes:
    if any(leaf.dtype.kind == "V" for leaf in weights.values()):
        raise SettingError(
            f"{out}: NumPy's files have no bfloat16. Give a name that ends in "
            ".safetensors, or --dtype float32.",
        )
    file = io.BytesIO()
    np.savez(file, **weights)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _check_suffix(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise SettingError(
            f"{out} ends in {out.suffix!r}; expected {' or '.join(SUFFIXES)}."
            f"{did_you_mean(out.suffix, SUFFIXES)}",
        )
