"""`python -m bnjax COMMAND` is `bnjax COMMAND`."""

import sys
from pathlib import Path

import bnjax

if __name__ == "__main__":
    # With `python -m`, Python first imports from the current folder, which may be a
    # stranger's run. A clone of this project stays in the path, because it has bnjax.
    if Path(sys.path[0]) == Path.cwd() != Path(bnjax.__file__).parents[1]:
        del sys.path[0]

    from bnjax.cli import main

    sys.exit(main())
