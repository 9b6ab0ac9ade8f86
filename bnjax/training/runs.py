"""What is done with a run after it: images classified, BN folded, a new run written."""

import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.data.config import SettingError
from bnjax.data.images import SUFFIXES, ImageError, printable, read_file
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import Source
from bnjax.folding import Folded, fold_batch_norm
from bnjax.training.checkpoint import CheckpointMetadata, open_checkpoints
from bnjax.training.config import Config, RunError
from bnjax.training.evaluation import LoadedRun, Predictor, softmax
from bnjax.training.metrics import ProgressReporter
from bnjax.training.program import Program
from bnjax.training.sharding import Spmd
from bnjax.training.step import TrainState
from bnjax.training.workdir import (
    CONFIG,
    describe,
    write_json,
    writing,
)

BATCH = 64
"""How many images are classified at a time."""
MAX_VALUE = 255
"""Of an image in a file, whatever the data set has."""
EXAMPLES = 16
"""How many random inputs a folded network is compared on."""


def list_images(places: Sequence[Path]) -> list[Path]:
    """Return the images at some places.

    Args:
        places: files, and folders, which are searched at every depth for what has the
            suffix of an image.

    Raises:
        SettingError: one is not there, or holds no image.
    """
    files = []
    for place in places:
        found = [place] if place.is_file() else []
        if place.is_dir():
            found = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            problem = f"holds no image ({', '.join(SUFFIXES)})"
            raise SettingError(
                f"{place} {problem if place.is_dir() else 'is not there'}. Give image "
                "files, or folders that hold some.",
            )
        files += found
    if not files:
        raise SettingError("no image is given: name files, or folders of them.")
    return files


def classify(
    run: LoadedRun, files: Sequence[Path], top: int
) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Return the most probable classes of images, prepared as the run's test images.

    Args:
        run: opened.
        files: of images.
        top: how many classes to give.

    Returns:
        The step of the checkpoint; `file` and `predictions` of each image; the files
        that cannot be decoded.

    Raises:
        RunError: no image can be decoded, one is not of the network's size and the run
            resized none, or the network overflows.
    """
    program, state = run.restore()
    predictor = Predictor(
        program.model,
        make_to_inputs(run.config.data, MAX_VALUE),
        state,
        Spmd(jax.local_devices()[:1]),
    )
    names = run.source.class_names
    described: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for found, pixels in _image_batches(files, run.source, unreadable):
        probabilities = softmax(np.asarray(predictor(pixels))[: len(found)])
        if not np.isfinite(probabilities).all():
            raise RunError(
                f"the network of {run.workdir} gives {found[0]} no finite probability: "
                "its outputs overflow. Train again with a lower --learning-rate."
            )
        for file, row in zip(found, probabilities, strict=True):
            predictions = [
                {
                    "class": names[label] if names else str(label),
                    "label": label,
                    "probability": float(row[label]),
                }
                for label in np.argsort(-row, kind="stable")[:top].tolist()
            ]
            described.append({"file": printable(file), "predictions": predictions})
    if not described:
        raise RunError(
            f"none of {len(files):,} files can be decoded, {files[0]} being the first. "
            "Expected JPEG, PNG, BMP or WebP."
        )
    return int(state.step), described, unreadable


def _image_batches(
    files: Sequence[Path], source: Source, unreadable: list[str]
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Give the decoded images some at a time, the last filled up with zeros.

    Files that are no image are named on standard error and in `unreadable`.
    """
    size = min(BATCH, len(files))
    report = ProgressReporter("images", verb="classifying")
    for start in range(0, len(files), size):
        found = []
        pixels = np.zeros((size, *source.image_shape), np.uint8)
        for file in files[start : start + size]:
            try:
                image = _read_image(file, source)
            except ImageError as error:
                print(f"note: {printable(file)} {error}, left out", file=sys.stderr)
                unreadable.append(printable(file))
                continue
            pixels[len(found)] = image
            found.append(file)
        if found:
            yield found, pixels
        report(min(start + size, len(files)), len(files))


def _read_image(file: Path, source: Source) -> np.ndarray:
    """Return one image as the network is given it."""
    shape = source.image_shape
    image = source.decode(read_file(file))
    if source.resize is not None:
        return source.resize(image)
    if image.shape[:2] != shape[:2]:
        given, expected = ("x".join(map(str, s[:2])) for s in (image.shape, shape))
        raise RunError(
            f"{file} is {given} pixels (height x width); the network takes {expected}, "
            "and its run resized no image (--data.image-size). Resize it first."
        )
    return image.reshape(shape)


def fold_state(
    program: Program,
    state: TrainState,
    image_shape: tuple[int, ...],
    dtype: Any = None,
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


def find_layers(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    scale_below: float = 1e-3,
    var_below: float = 1e-5,
) -> list[dict[str, Any]]:
    """Describe every layer that has a running mean and variance, as JSON.

    Args:
        params: of a network; "scale" and "bias" lie where the statistics do.
        batch_stats: of the network, with the leaves "mean" and "var".
        scale_below: a unit is dead where |scale| is below it, at every position where
            the scale has several.
        var_below: a unit is dead where the running variance is below it.

    Returns:
        The layers by their paths, numbers in their order.

    Example:
        >>> params = {"bn": {"scale": np.array([1.0, 0.0, 2.0])}}
        >>> stats = {"bn": {"mean": np.zeros(3), "var": np.array([4.0, 1.0, 0.0])}}
        >>> [layer] = find_layers(params, stats)
        >>> layer["path"], layer["features"], layer["dead"], layer["var"]
        ('bn', 3, 2, {'min': 0.0, 'max': 4.0})
    """
    layers = []
    for path, (mean, var) in _find_statistics(batch_stats).items():
        near = functools.reduce(lambda tree, key: tree.get(key, {}), path, params)
        scale, bias = (near.get(name) for name in ("scale", "bias"))
        flat = var < var_below
        silent = np.zeros_like(flat)
        if scale is not None:
            per_unit = np.abs(np.asarray(scale)).reshape(-1, *var.shape).max(0)
            silent = per_unit < scale_below
        ranges = {
            name: None
            if array is None
            else {"min": float(np.min(array)), "max": float(np.max(array))}
            for name, array in zip(
                ("scale", "bias", "mean", "var"), (scale, bias, mean, var), strict=True
            )
        }
        layers.append(
            {
                "path": "/".join(path) or "(top level)",
                "features": mean.size,
                **ranges,
                "scale_near_zero": int(silent.sum()),
                "var_near_zero": int(flat.sum()),
                "dead": int((silent | flat).sum()),
            }
        )
    return layers


def _find_statistics(
    batch_stats: Mapping[str, Any],
) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    """Return mean and variance by the path of the layer, numbers in their order."""
    leaves = {
        path: np.asarray(leaf) for path, leaf in flatten_dict(batch_stats).items()
    }
    layers = [
        path[:-1]
        for path in leaves
        if path[-1] == "mean" and (*path[:-1], "var") in leaves
    ]

    def in_order(path: tuple[str, ...]) -> list[Any]:
        parts = re.split(r"(\d+)", "/".join(path))
        return [int(part) if part.isdigit() else part for part in parts]

    return {
        path: (leaves[(*path, "mean")], leaves[(*path, "var")])
        for path in sorted(layers, key=in_order)
    }


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
    old, new = map(_find_statistics, (before, after))
    rows = []
    for path, pair in old.items():
        mean, var, new_mean, new_var = map(np.float64, (*pair, *new[path]))
        var = np.maximum(var, np.finfo(np.float64).tiny)
        ratio, moved = new_var / var, np.abs(new_mean - mean) / np.sqrt(var)
        rows.append(
            (
                "/".join(path) or "(top level)",
                f"{moved.max():.2g}",
                f"{ratio.min():.2g} to {ratio.max():.2g}",
            )
        )
    return format_table(("layer", "mean moved by (std)", "var times"), rows)


def check_new_run(workdir: Path, *, force: bool = False) -> None:
    """Refuse a folder that a run cannot be written to, before any work is done.

    Args:
        workdir: the folder.
        force: a run that is there may be replaced; nothing else may.

    Raises:
        SettingError: it is there already, or the folder it is to be in is not.
    """
    if not workdir.parent.is_dir():
        raise SettingError(
            f"--output {workdir}: {workdir.parent} is not there. Make it first, or "
            "give another place.",
        )
    if not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())):
        return
    if not (workdir / CONFIG).is_file():
        raise SettingError(
            f"--output {workdir} is there and holds no run: expected a folder that is "
            "new or empty, or with --force one that holds a run.",
        )
    if not force:
        raise SettingError(
            f"--output {workdir} holds a run already. Nothing was overwritten: give "
            "another folder, or --force to replace it.",
        )


def write_run(
    workdir: Path,
    preset: str,
    config: Config,
    source: Source,
    state: TrainState,
    made_by: dict[str, Any],
    *,
    metadata: CheckpointMetadata | None = None,
    force: bool = False,
) -> None:
    """Write a run's folder with one checkpoint, whole or not at all.

    Args:
        workdir: the folder.
        preset: that config.json names.
        config: of the run.
        source: of its data; it may be without examples.
        state: of the checkpoint.
        made_by: what else config.json says: the command, and what it was given.
        metadata: of the checkpoint.
        force: a run that is there may be replaced.

    Raises:
        SettingError: as `check_new_run`.
        RunError: the state is not finite, or the disk is full.
    """
    check_new_run(workdir, force=force)
    with writing(workdir):
        scratch = Path(tempfile.mkdtemp(dir=workdir.parent, prefix=f".{workdir.name}."))
    try:
        folder = scratch / "new"
        folder.mkdir()
        described = {**describe(preset, config, source), "made_by": made_by}
        write_json(folder / CONFIG, described)
        with open_checkpoints(folder, config) as checkpoints:
            checkpoints.save(state, metadata)
            checkpoints.wait()
        with writing(workdir):
            if workdir.exists():
                workdir.rename(scratch / "old")
            folder.rename(workdir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns: the first set left, the others right.

    Args:
        header: a name a column.
        rows: of as many cells each.

    Example:
        >>> print(format_table(("layer", "dead"), [("bn_0", "0"), ("bn_10", "12")]))
        layer  dead
        bn_0      0
        bn_10    12
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (header, *rows)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
