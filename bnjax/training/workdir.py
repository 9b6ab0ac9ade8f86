"""The folder of a run: claimed once, written whole."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnjax.training.errors import UserError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
EVALUATION = "eval.json"
CHECKPOINTS = "checkpoints"


def default_workdir(preset: str) -> Path:
    """Return runs/<preset>-<time>, a folder that does not exist yet."""
    stem = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / stem
    count = 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{stem}-{count}"
    return path


def claim(workdir: Path) -> None:
    """Make the folder, or refuse it: it holds a run, or cannot be written to.

    Raises:
        UserError: saying which, and what to do. Nothing in it has been changed.
    """
    ours = (CONFIG, METRICS, SUMMARY, EVALUATION, CHECKPOINTS)
    with writing(workdir):
        held = [name for name in ours if (workdir / name).exists()]
        if held:
            raise UserError(
                f"workdir {workdir} holds a run already ({', '.join(held)}). Nothing "
                "was overwritten: give another --workdir, or delete this one."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass


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
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


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
