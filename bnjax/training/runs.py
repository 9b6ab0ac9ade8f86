"""Use a finished run: classify images, fold BN, examine it, write a new run."""

import contextlib
import functools
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

from bnjax._validate import layer_name
from bnjax.data.config import DataError, SettingError
from bnjax.data.images import SUFFIXES, ImageError, printable, read_file
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import Source
from bnjax.doctor import Finding, doctor
from bnjax.folding import Folded, fold_batch_norm
from bnjax.interop.torch import natural
from bnjax.training.checkpoint import CheckpointMetadata, open_checkpoints
from bnjax.training.config import Config, RunError
from bnjax.training.evaluation import LoadedRun, load_run, make_predictor, softmax
from bnjax.training.metrics import ProgressReporter
from bnjax.training.program import Program, make_run_feed
from bnjax.training.sharding import Spmd
from bnjax.training.step import Stream, TrainState, stream_key
from bnjax.training.workdir import (
    CONFIG,
    LOCK,
    claim,
    describe,
    write_json,
    writing,
)

BATCH = 64
"""The number of images in a batch of `classify`."""
MAX_VALUE = 255
"""The channels of an image file, whatever the data set has."""
EXAMPLES = 16
"""The number of random inputs to compare a folded network on."""


def list_images(places: Sequence[Path]) -> list[Path]:
    """Return the given image files, and the images in folders at every depth."""
    files = []
    for place in places:
        found, problem = [place] if place.is_file() else [], "is not there"
        if place.is_dir():
            found = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
            problem = f"holds no image ({', '.join(SUFFIXES)})"
        if not found:
            raise SettingError(
                f"{place} {problem}. Give image files, or folders that hold some."
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
        run: the run.
        files: the image files.
        top: the number of classes for each image.

    Returns:
        The step of the checkpoint; `file` and `predictions` for each image; the files
        that cannot be decoded.
    """
    program, state = run.restore()
    to_inputs = make_to_inputs(run.config.data, MAX_VALUE)
    device = Spmd(jax.local_devices()[:1])
    predict = make_predictor(program.model, to_inputs, state, device)
    names = run.source.class_names
    described: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for found, pixels in _image_batches(files, run.source, unreadable):
        probabilities = softmax(np.asarray(predict(pixels))[: len(found)])
        if not np.isfinite(probabilities).all():
            raise RunError(
                f"the network of {run.workdir} has no finite probability for "
                f"{found[0]}: its outputs overflow. Train again with a lower "
                "--learning-rate."
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
            f"none of {len(files):,} files can be decoded; the first is {files[0]}. "
            f"Expected one of {', '.join(SUFFIXES)}."
        )
    return int(state.step), described, unreadable


def _image_batches(
    files: Sequence[Path], source: Source, unreadable: list[str]
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Yield batches of decoded images; the last batch is padded with zeros.

    Files that cannot be decoded are reported on standard error and in `unreadable`.
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
    """Return one image, prepared for the network."""
    shape = source.image_shape
    image = source.decode(read_file(file))
    if source.resize is not None:
        return source.resize(image)
    if image.shape[:2] != shape[:2]:
        given, expected = ("x".join(map(str, s[:2])) for s in (image.shape, shape))
        raise RunError(
            f"{file} has {given} pixels (height x width), but the network takes "
            f"{expected}, and its run did not resize images (--data.image-size). "
            "Resize it first."
        )
    return image.reshape(shape)


def fold_state(
    program: Program,
    state: TrainState,
    image_shape: tuple[int, ...],
    dtype: Any = None,
) -> tuple[Folded, float]:
    """Fold a network into weights of `dtype`, or of its own dtype.

    Returns:
        The folded network, and the largest difference of its logits from the original
        logits on random inputs.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    apply = functools.partial(program.model.apply, train=False)
    x = jax.random.uniform(jax.random.key(0), (EXAMPLES, *image_shape))
    try:
        folded = fold_batch_norm(apply, variables, x, dtype=dtype and jnp.dtype(dtype))
    except ValueError as error:
        raise RunError(f"the network cannot be folded: {error}") from error
    before, after = map(np.float64, (jax.jit(apply)(variables, x), folded(x)))
    return folded, float(np.abs(before - after).max())


def examine_run(
    run: LoadedRun, ignore: Sequence[str] = ()
) -> tuple[TrainState, tuple[Finding, ...]]:
    """Return the newest checkpoint, and the doctor's findings in it.

    The doctor gets the first training batch, or the part of it that is normalized
    together.
    """
    config = run.config
    program, state = run.restore()
    if not state.batch_stats:
        return state, ()
    with contextlib.closing(make_run_feed(config, run.source)) as feed:
        item = jax.tree.map(lambda leaf: leaf[0], feed.chunk(0, 1))
        key = stream_key(state.rng, Stream.AUGMENT)
        batch = jax.jit(feed.batch)(feed.constants, item, key)
    together = config.batch_size // config.accumulate
    together = min(together, config.bn.virtual_batch_size or together)
    if config.init_stats == "freeze":
        ignore = (*ignore, "frozen-in-training")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    findings = doctor(
        program.model,
        variables,
        batch["image"][:together],
        optimizer=program.optimizer,
        ignore=ignore,
    )
    return state, findings


def try_to_examine(
    workdir: Path, data_dir: Path | None = None, *, trust: bool = False
) -> tuple[Finding, ...] | str:
    """Return the findings in a run, or a sentence that says why there are none."""
    try:
        return examine_run(load_run(workdir, data_dir, trust=trust))[1]
    except (DataError, RunError, SettingError) as error:
        return str(error)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return a table of findings with their number, and the fix for each rule.

    Examples:
        >>> print(
        ...     format_findings([Finding("r", "error", "bn", {"x": 0.5}, "M.", "F.")])
        ... )
        1 finding
        error  bn  r  x 0.5
        <BLANKLINE>
        r: M. F.
    """
    count = f"{len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}"
    cells = [
        (
            each.severity,
            each.path,
            each.rule,
            ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in each.evidence.items()
            ),
        )
        for each in findings
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    first = {each.rule: each for each in reversed(findings)}
    advice = [
        f"\n{each.rule}: {each.message} {each.fix}"
        for each in findings
        if first[each.rule] is each
    ]
    return "\n".join([count, *rows, *advice])


def find_layers(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    scale_below: float = 1e-3,
    var_below: float = 1e-5,
) -> list[dict[str, Any]]:
    """Describe every layer that has a running mean and variance, as JSON.

    A unit is dead if its absolute scale is below `scale_below` (at every position, if
    the scale has several), or if its running variance is below `var_below`. The layers
    are in the order of their paths, with numbers in numerical order.

    Examples:
        >>> params = {"bn": {"scale": np.array([1.0, 0.0, 2.0])}}
        >>> stats = {"bn": {"mean": np.zeros(3), "var": np.array([4.0, 1.0, 0.0])}}
        >>> [layer] = find_layers(params, stats)
        >>> layer["path"], layer["features"], layer["dead"], layer["var"]
        ('bn', 3, 2, {'min': 0.0, 'max': 4.0})
    """
    layers = []
    leaves: dict[tuple[str, ...], Any] = flatten_dict(params)
    for path, (mean, var) in _find_statistics(batch_stats).items():
        arrays: dict[str, Any] = {
            name: leaves.get((*path, name)) for name in ("scale", "bias")
        }
        arrays |= {"mean": mean, "var": var}
        ranges = {
            name: None if a is None else {"min": float(a.min()), "max": float(a.max())}
            for name, a in arrays.items()
        }
        flat = var < var_below
        silent = np.zeros_like(flat)
        if (scale := arrays["scale"]) is not None:
            silent = np.abs(scale).reshape(-1, *var.shape).max(0) < scale_below
        layers.append(
            {
                "path": layer_name(path),
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
    """Return mean and variance by the path of the layer, in numerical order."""
    leaves = {path: np.asarray(a) for path, a in flatten_dict(batch_stats).items()}
    means = (path[:-1] for path in leaves if path[-1] == "mean")
    return {
        path: (leaves[(*path, "mean")], leaves[(*path, "var")])
        for path in sorted(means, key=lambda path: natural("/".join(path)))
        if (*path, "var") in leaves
    }


def describe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    r"""Return a table of the change of each layer's statistics.

    $$
    \max_k \lvert \mu'_k - \mu_k \rvert / \sigma_k, \quad
    \min_k \sigma'^2_k / \sigma^2_k, \quad \max_k \sigma'^2_k / \sigma^2_k
    $$

    Examples:
        >>> before = {"bn": {"mean": np.zeros(2), "var": np.array([4.0, 1.0])}}
        >>> after = {"bn": {"mean": np.ones(2), "var": np.array([4.0, 3.0])}}
        >>> print(describe_change(before, after))
        layer  mean moved by (std)  var times
        bn                       1     1 to 3
    """
    new, rows = _find_statistics(after), []
    for path, pair in _find_statistics(before).items():
        mean, var, new_mean, new_var = map(np.float64, (*pair, *new[path]))
        var = np.maximum(var, np.finfo(np.float64).tiny)
        ratio, moved = new_var / var, np.abs(new_mean - mean) / np.sqrt(var)
        ratios = f"{ratio.min():.2g} to {ratio.max():.2g}"
        rows.append((layer_name(path), f"{moved.max():.2g}", ratios))
    return format_table(("layer", "mean moved by (std)", "var times"), rows)


def check_new_run(workdir: Path, *, force: bool = False) -> None:
    """Refuse a folder that a run cannot be written to, before any work is done.

    With `force`, an existing run may be replaced, but nothing else.
    """
    if not workdir.parent.is_dir():
        raise SettingError(
            f"--output {workdir}: {workdir.parent} does not exist. Create it first, or "
            "give another folder.",
        )
    if not workdir.exists():
        return
    # A run whose settings were refused leaves its lock behind.
    if workdir.is_dir() and all(path.name == LOCK for path in workdir.iterdir()):
        return
    if not (workdir / CONFIG).is_file():
        raise SettingError(
            f"--output {workdir} exists and holds no run: expected a folder that is "
            "new or empty, or, with --force, a folder with a run.",
        )
    if not force:
        raise SettingError(
            f"--output {workdir} holds a run already. Nothing was overwritten: give "
            "another folder, or --force to replace the run.",
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

    `made_by` has further entries of config.json: the command and its arguments. The
    source may be without examples. For `force` see `check_new_run`.
    """
    check_new_run(workdir, force=force)
    with contextlib.ExitStack() as stack:
        if workdir.exists():
            stack.enter_context(claim(workdir, resume=force))
        with writing(workdir):
            scratch = Path(
                tempfile.mkdtemp(dir=workdir.parent, prefix=f".{workdir.name}.")
            )
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
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


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, the first column left-aligned, the others right-aligned.

    Examples:
        >>> print(format_table(("layer", "dead"), [("bn_0", "0"), ("bn_10", "12")]))
        layer  dead
        bn_0      0
        bn_10    12
    """
    first, *rest = (max(map(len, cells)) for cells in zip(header, *rows, strict=True))
    formats = [f"<{first}", *(f">{width}" for width in rest)]
    lines = ("  ".join(map(format, row, formats)) for row in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)
