"""What can be done with a trained network: python -m bnjax COMMAND.

python -m bnjax --help            every command
python -m bnjax COMMAND --help    its flags

docs/command-line.md says more.
"""

import sys
from collections.abc import Sequence

import bnjax
from bnjax.cli import run_reporting
from bnjax.commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"]):
        print(_overview())
        return 0
    if words == ["--version"]:
        print(bnjax.__version__)
        return 0

    def run() -> None:
        # Opens what the command needs, and no more.
        from bnjax.commands.command_line import parse

        parse(words)()

    return run_reporting(run)


def _overview() -> str:
    """Return what --help prints."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        (
            "usage: python -m bnjax COMMAND ...",
            "",
            "What can be done with a network that train.py trained:",
            *(f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()),
            "",
            "Its arguments and flags: python -m bnjax COMMAND --help.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
