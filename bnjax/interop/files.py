"""Files given out: never over another by accident, never half written."""

from pathlib import Path

from bnjax.training.errors import USAGE, UserError
from bnjax.training.workdir import replacing_bytes


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Args:
        path: of a file.
        overwrite: a file that is there may be replaced.

    Raises:
        UserError: it is there already, is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; expected the name of a file to write.", USAGE
        )
    if not path.parent.is_dir():
        raise UserError(
            f"{path} is in a folder that is not there. Make {path.parent} first, or "
            "give another place.",
            USAGE,
        )
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} is there already, and was not overwritten. Give another name, or "
            "--force (overwrite=True) to replace it.",
            USAGE,
        )


def write_output(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        content: all of it.
        overwrite: a file that is there may be replaced.

    Raises:
        UserError: as `check_output`, or the disk does not take it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights"
        >>> write_output(path, b"12")
        >>> path.read_bytes()
        b'12'
        >>> write_output(path, b"34")
        Traceback (most recent call last):
        bnjax.training.errors.UserError: .../weights is there already, and was not
        overwritten. Give another name, or --force (overwrite=True) to replace it.
    """
    check_output(path, overwrite=overwrite)
    try:
        with replacing_bytes(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}. Give a place on "
            "a disk with room, and with permission to write."
        ) from error
