"""The folder of a run: claimed once, written whole."""

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax

import bnjax
from bnjax._files import replacing
from bnjax.data.config import SettingError
from bnjax.training.config import Config, RunError, differences, from_json, to_json

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
        RunError: saying which, and what to do. Nothing in it has been changed.
    """
    ours = (CONFIG, METRICS, SUMMARY, EVALUATION, CHECKPOINTS)
    with writing(workdir):
        held = [name for name in ours if (workdir / name).exists()]
        if held and not (resume and CONFIG in held):
            advice = "" if resume else "add --resume to continue it, or "
            raise RunError(
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
        raise RunError(
            f"{path} could not be written: {reason}. Give a folder on a disk with "
            "room, and with permission to write, as --workdir."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path), replacing(path) as file:
        file.write(text)


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
        RunError: it is not there, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{path.parent} is no run: it has no {path.name}. Expected a folder that "
            "train.py wrote, such as runs/digits-<time>."
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Restore the file, or train again."
        ) from error


def describe(preset: str, config: Config) -> dict[str, Any]:
    """Return what config.json holds: all that the run is a function of."""
    return {
        "preset": preset,
        "config": to_json(config),
        "versions": {
            "bnjax": bnjax.__version__,
            "flax": flax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
    }


def read_config(workdir: Path) -> Config:
    """Return the configuration that a run was started with.

    Raises:
        RunError: the folder is no run, or its config.json is damaged.
    """
    record = _read(workdir)
    versions = record.get("versions")
    made_by = versions.get("bnjax") if isinstance(versions, dict) else None
    return from_json(record["config"], str(workdir / CONFIG), made_by)


def check_same(workdir: Path, preset: str, config: Config) -> None:
    """Refuse to go on with a run under another configuration.

    Other versions or another device are named on standard error, since the results
    may then differ in the last digits.

    Raises:
        RunError: naming each flag that differs, or config.json is damaged.
    """
    changed = differences(read_config(workdir), config)
    if changed:
        raise SettingError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. "
            "Give the flags it was started with, or another --workdir.",
        )
    before, now = _read(workdir), describe(preset, config)
    for name in ("versions", "device"):
        if before.get(name) != now[name]:
            print(
                f"note: the run was started with {name} {before.get(name)} and goes on "
                f"with {now[name]}; the last digits of its results may differ.",
                file=sys.stderr,
            )


def _read(workdir: Path) -> dict[str, Any]:
    record = read_json(workdir / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise RunError(
            f"{workdir / CONFIG} is damaged: it has no 'config'. Restore the file, or "
            "train again."
        )
    return record
