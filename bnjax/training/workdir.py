"""The folder of a run: claimed once, written whole."""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from bnjax.training.errors import UserError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
EVALUATION = "eval.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
PROFILE = "profile"


def default_workdir(preset: str) -> Path:
    """Return runs/<preset>-<time>, a folder that does not exist yet."""
    stem = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / stem
    count = 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{stem}-{count}"
    return path


def claim(workdir: Path, *, resume: bool = False) -> bool:
    """Make the folder, or refuse it: it holds a run, or cannot be written to.

    Args:
        workdir: the folder.
        resume: take a folder that holds a run.

    Returns:
        Whether it holds a run to resume.

    Raises:
        UserError: saying which, and what to do. Nothing in it has been changed.
    """
    ours = (CONFIG, METRICS, SUMMARY, EVALUATION, CHECKPOINTS)
    with writing(workdir):
        held = [name for name in ours if (workdir / name).exists()]
        if held and not (resume and CONFIG in held):
            advice = "" if resume else "add --resume to continue it, or "
            raise UserError(
                f"workdir {workdir} holds a run already ({', '.join(held)}). Nothing "
                f"was overwritten: {advice}give another --workdir."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        for name in ours:
            for unfinished in workdir.glob(f".{name}.*"):
                unfinished.unlink()
    return bool(held)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write under `path` into a message."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path} could not be written: {reason}. Give a folder on a disk with "
            "room, and with permission to write, as --workdir."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path), replacing(path) as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a file to write, which takes the place of `path` when it is complete."""
    with replacing_bytes(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
        yield file
        file.detach()


@contextlib.contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write bytes to, as `replacing` does for text."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        UserError: it is not there, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is no run: it has no {path.name}. Expected a folder that "
            "train.py wrote, such as runs/digits-<time>."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: {error}. Restore the file, or train again."
        ) from error
