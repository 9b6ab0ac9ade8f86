"""The folder of what is kept between runs, and can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return $BNJAX_CACHE_DIR, or bnjax in the user's cache folder."""
    if given := os.environ.get("BNJAX_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bnjax"
