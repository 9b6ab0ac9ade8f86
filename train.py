"""Train a network with batch normalization; the same as `bnjax train`.

python train.py                        the paper's network on small digits, in seconds
python train.py mnist                  section 4.1 of the paper
python train.py mnist --no-batch-norm  the same without normalization
python train.py --help                 every flag

docs/programs/training.md says what a run writes.
"""

import sys
from collections.abc import Sequence

from bnjax.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Train according to the command line, and return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run_command("train", words, prog="python train.py")


if __name__ == "__main__":
    sys.exit(main())
