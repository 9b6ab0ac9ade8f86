"""Decoded arrays kept between runs, so that images are decoded once.

An entry is an uncompressed .npz file, whose CRC-32 is checked as it is read. What
cannot be read is made again, and a cache that cannot be written costs time and
nothing else.
"""

import contextlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bnjax._cache import cache_dir
from bnjax.data.resident import Arrays


def cached(key: str, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept under `key`, or make them and keep them.

    Args:
        key: names the file; it must change whenever what `make` returns does.
        make: gives the arrays where there is no sound entry.
    """
    path = cache_dir() / f"{key}.npz"
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, NotImplementedError) as error:
            _note(f"cache {path} is damaged and is made again ({error})")
        except zipfile.BadZipFile as error:
            _note(f"cache {path} is damaged and is made again ({error})")
    arrays = make()
    try:
        _write(path, arrays)
    except OSError as error:
        _note(f"cache {path} could not be written; the next run decodes again: {error}")
    return arrays


def _read(path: Path) -> Arrays:
    # np.load leaves a file it was given by name open where it cannot read it.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
        return Arrays(entry["images"], entry["labels"])


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, images=arrays.images, labels=arrays.labels)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)
