"""Whether the files of a folder are still what was written."""

import hashlib
from pathlib import Path


def digests(folder: Path, *, leave_out: str = "") -> dict[str, str]:
    """Return the SHA-256 of every file, by its path within the folder.

    Args:
        folder: looked through with all folders below.
        leave_out: the name of a file that is not digested.
    """
    return {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != leave_out
    }


def first_change(folder: Path, expected: dict[str, str]) -> str | None:
    """Say which file is no longer as its digest says, or nothing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_text("one")
        >>> before = digests(folder)
        >>> first_change(folder, before)
        >>> _ = (folder / "a").write_text("two")
        >>> first_change(folder, before)
        'a is not what was written'
    """
    found = digests(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
