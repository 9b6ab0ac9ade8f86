"""The cache folder, and output files that are written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal


class OutputError(ValueError):
    """An output file cannot be written to the given path."""


def cache_dir() -> Path:
    """Return $BNJAX_CACHE_DIR, or bnjax in the user's cache folder."""
    if given := os.environ.get("BNJAX_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bnjax"


@contextlib.contextmanager
def replacing(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path` when it is complete."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        encoding = "utf-8" if mode == "w" else None
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that cannot be written to, before any work is done."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the name of a file to write.")
    if not path.parent.is_dir():
        raise OutputError(
            f"{path} is in a folder that does not exist. Create {path.parent} first, "
            "or choose another path.",
        )
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already, and was not overwritten. Choose another name, or "
            "pass --force (overwrite=True) to replace it.",
        )


def write_output(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file whole or not at all, to a path that `check_output` accepts.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights"
        >>> write_output(path, b"12")
        >>> path.read_bytes()
        b'12'
    """
    check_output(path, overwrite=overwrite)
    try:
        with replacing(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}. Choose a path on "
            "a disk with free space, and with permission to write."
        ) from error
