"""The folder of a run: one process writes it, and each file is written whole."""

import contextlib
import itertools
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import flax
import jax

import bnjax
from bnjax._files import replacing
from bnjax.data.config import SettingError
from bnjax.data.sources import Source, is_folder
from bnjax.training.config import Config, RunError, differences, from_json, to_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LAYERS = "layers.jsonl"
SUMMARY = "summary.json"
EVALUATION = "eval.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
OURS = (CONFIG, METRICS, LAYERS, SUMMARY, EVALUATION, CHECKPOINTS)


def default_workdir(preset: str, data_name: str = "") -> Path:
    """Return runs/<preset>-<time>, a folder that does not exist yet.

    The name of a folder of images follows the name of the preset, because no preset is
    made for such a folder.
    """
    stem = preset
    if is_folder(data_name):
        folder = Path(data_name).expanduser().resolve().name
        stem = f"{preset}-{re.sub(r'[^A-Za-z0-9._-]+', '_', folder)}"
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    ends = itertools.chain([""], (f"-{count}" for count in itertools.count(2)))
    paths = (Path("runs") / f"{stem}{end}" for end in ends)
    return next(path for path in paths if not path.exists())


@contextlib.contextmanager
def claim(workdir: Path, *, resume: bool = False) -> Iterator[bool]:
    """Make the folder, and lock it against every other process meanwhile.

    The system releases the lock when this process ends in any way. The context yields
    whether the folder holds a run; only `resume` allows one. On failure, the folder is
    unchanged.
    """
    with contextlib.ExitStack() as stack:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((workdir / LOCK).open("a+", encoding="utf-8"))
            _lock(lock, workdir)
            found = [name for name in OURS if (workdir / name).exists()]
            if found and not (resume and CONFIG in found):
                advice = "" if resume else "add --resume to continue it, or "
                raise RunError(
                    f"workdir {workdir} holds a run already ({', '.join(found)}). "
                    f"Nothing was overwritten: {advice}give another --workdir."
                )
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            for name in OURS:
                for unfinished in workdir.glob(f".{name}.*"):
                    unfinished.unlink()
        yield bool(found)


def _lock(lock: TextIO, workdir: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has none")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise RunError(
            f"workdir {workdir} is being written by {lock.read() or 'another process'}"
            ". Nothing was changed: wait until that process has ended, or give another "
            "--workdir."
        ) from None
    except OSError as error:
        # Some network file systems have no locks; do not refuse to run there.
        print(
            f"note: {workdir} cannot be locked ({error.strerror or error}): make sure "
            "that no other process writes to it.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write under `path` into a message."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror or error}. Give a --workdir "
            "on a disk with free space, where you have permission to write."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path), replacing(path) as file:
        file.write(text)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{path.parent} is not a run: it has no {path.name}. Expected a folder "
            "that train.py wrote, such as runs/digits-<time>."
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Restore the file, or train again."
        ) from error


def describe(preset: str, config: Config, source: Source) -> dict[str, Any]:
    """Return the contents of config.json, which determine the run."""
    return {
        "preset": preset,
        "config": to_json(config),
        "data": source.description,
        "files": source.files,
        "versions": {
            **{module.__name__: module.__version__ for module in (bnjax, flax, jax)},
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
    }


def read_config(workdir: Path) -> Config:
    """Return the configuration of a run."""
    return config_of(workdir, read_record(workdir))


def config_of(workdir: Path, record: dict[str, Any]) -> Config:
    """Return the configuration in a record of `read_record`."""
    return from_json(record["config"], str(workdir / CONFIG), made_by(record))


def made_by(record: dict[str, Any]) -> str | None:
    """Return the version of bnjax that started a run, if it is recorded."""
    versions = record.get("versions")
    return versions.get("bnjax") if isinstance(versions, dict) else None


def check_same(
    workdir: Path, record: dict[str, Any], described: dict[str, Any], config: Config
) -> None:
    """Refuse to continue a run with another configuration than that of its record.

    Standard error reports other versions or another device.
    """
    if changed := differences(config_of(workdir, record), config):
        raise SettingError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. "
            "Give the flags of its start, or another --workdir.",
        )
    if moved := changed_files(record, described["files"]):
        raise SettingError(
            f"{workdir} cannot be continued: {moved}. Restore the folder, or train in "
            "another --workdir."
        )
    for name in ("versions", "device"):
        before, now = record.get(name), described[name]
        if before != now:
            print(
                f"note: the run was started with {name} {before} and continues with "
                f"{now}; the last digits of its results may differ.",
                file=sys.stderr,
            )


def changed_files(record: dict[str, Any], files: dict[str, str]) -> str:
    """Return what changed in the image folder of a run since it started, or ""."""
    before = record.get("files", files)
    if before == files:
        return ""
    return (
        "files were added, removed or renamed in its folder of images since it started "
        f"(config.json has {before!r}; now {files!r}), so that images may have moved "
        "from the training set to the test set"
    )


def read_record(workdir: Path) -> dict[str, Any]:
    """Return the contents of config.json; see `describe`."""
    record = read_json(workdir / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise RunError(
            f"{workdir / CONFIG} is damaged: it has no 'config'. Restore the file, or "
            "train again."
        )
    return record
