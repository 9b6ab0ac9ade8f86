"""Images of the user's own, classified by a trained run."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax._files import check_output, write_output
from bnjax.commands.table import format_table
from bnjax.data.config import SettingError
from bnjax.data.images import SUFFIXES, ImageError, printable, read_file
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import Source
from bnjax.training.config import RunError
from bnjax.training.evaluation import Predictor, load_run, softmax
from bnjax.training.metrics import ProgressReporter
from bnjax.training.sharding import Spmd

BATCH = 64
# Of an image in a file, whatever the data set has.
MAX_VALUE = 255


def predict_images(
    workdir: Path,
    images: Sequence[Path],
    *,
    top: int = 5,
    as_json: bool = False,
    output: Path | None = None,
    force: bool = False,
    data_dir: Path | None = None,
) -> None:
    """Print the most probable classes of images.

    Each image is prepared as the run's own evaluation prepares the test set.

    Args:
        workdir: the folder that train.py wrote.
        images: files, and folders that are searched for files.
        top: how many classes to give.
        as_json: print JSON in place of the table.
        output: the JSON goes to this file too.
        force: replace `output` if it is there.
        data_dir: where tfds data sets are, if no longer where the run found them.

    Raises:
        RunError: the folder is no run, there is no image, none can be decoded, or one
            is not of the network's size and the run resized none.
    """
    if top < 1:
        raise SettingError(f"--top {top}: expected 1 or more.")
    if output is not None:
        check_output(output, overwrite=force)
    files = list_images(images)
    run = load_run(workdir, data_dir)
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
    for found, pixels in _batches(files, run.source, unreadable):
        probabilities = softmax(np.asarray(predictor(pixels))[: len(found)])
        if not np.isfinite(probabilities).all():
            raise RunError(
                f"the network of {workdir} gives {found[0]} no finite probability: its "
                "outputs overflow. Train again with a lower --learning-rate."
            )
        for file, row in zip(found, probabilities, strict=True):
            first = np.argsort(-row, kind="stable")[:top].tolist()
            described.append(
                {
                    "file": printable(file),
                    "predictions": [
                        {
                            "class": names[label] if names else str(label),
                            "label": label,
                            "probability": float(row[label]),
                        }
                        for label in first
                    ],
                }
            )
    if not described:
        raise RunError(
            f"none of {len(files):,} files can be decoded, {files[0]} being the first. "
            "Expected JPEG, PNG, BMP or WebP."
        )
    result = {
        "workdir": str(workdir),
        "step": int(state.step),
        "images": described,
        "unreadable": unreadable,
    }
    text = json.dumps(result, indent=2)
    if output is not None:
        write_output(output, f"{text}\n".encode(), overwrite=force)
    print(text if as_json else _table(described))


def list_images(places: Sequence[Path]) -> list[Path]:
    """Return the images at some places.

    Args:
        places: files, and folders, which are searched at every depth for what has the
            suffix of an image.

    Raises:
        RunError: one is not there, or holds no image.
    """
    files = []
    for place in places:
        if place.is_dir():
            found = sorted(
                path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES
            )
            if not found:
                raise SettingError(
                    f"{place} holds no image ({', '.join(SUFFIXES)}). Give files, or "
                    "folders that hold some.",
                )
            files += found
        elif place.is_file():
            files.append(place)
        else:
            raise SettingError(
                f"{place} is not there. Give image files, or folders that hold some.",
            )
    if not files:
        raise SettingError("no image is given: name files, or folders of them.")
    return files


def _batches(
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
                image = _read(file, source)
            except ImageError as error:
                print(f"note: {printable(file)} {error}, left out", file=sys.stderr)
                unreadable.append(printable(file))
                continue
            pixels[len(found)] = image
            found.append(file)
        if found:
            yield found, pixels
        report(min(start + size, len(files)), len(files))


def _read(file: Path, source: Source) -> np.ndarray:
    """Return one image as the network is given it."""
    shape = source.image_shape
    image = source.decode(read_file(file))
    if source.resize is not None:
        return source.resize(image)
    if image.shape[:2] != shape[:2]:
        given, expected = (
            "x".join(map(str, each[:2])) for each in (image.shape, shape)
        )
        raise RunError(
            f"{file} is {given} pixels (height x width); the network takes {expected}, "
            "and its run resized no image (--data.image-size). Resize it first."
        )
    return image.reshape(shape)


def _table(described: Sequence[dict[str, Any]]) -> str:
    most = max(len(each["predictions"]) for each in described)
    rows = [
        (
            each["file"],
            *(f"{p['class']} {p['probability']:.2%}" for p in each["predictions"]),
        )
        for each in described
    ]
    return format_table(("image", *map(str, range(1, most + 1))), rows)
