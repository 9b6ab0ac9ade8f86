"""`python -m bnjax COMMAND` is `bnjax COMMAND`."""

import sys
from pathlib import Path

import bnjax

if __name__ == "__main__":
    # `python -m` has Python import from the current folder first, which may be a run
    # of a stranger's. A clone of this project stays: bnjax itself is in it.
    if Path(sys.path[0]) == Path.cwd() != Path(bnjax.__file__).parents[1]:
        del sys.path[0]

    from bnjax.cli import main

    sys.exit(main())
