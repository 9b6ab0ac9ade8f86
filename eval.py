"""Evaluate runs of train.py from their folders; the same as `bnjax eval`.

python eval.py RUN               top-1 and top-5 of its newest checkpoint
python eval.py RUN --crops 144   averaged over GoogLeNet's crops of each image
python eval.py RUN1 RUN2         each run, and their ensemble
python eval.py --help            every flag

docs/programs/evaluation.md says more.
"""

import sys
from collections.abc import Sequence

from bnjax.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate according to the command line, and return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run_command("eval", words, prog="python eval.py")


if __name__ == "__main__":
    sys.exit(main())
