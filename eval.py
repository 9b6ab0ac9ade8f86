"""Evaluate a run: python eval.py WORKDIR.

The model is rebuilt from the run's folder alone; the result is printed and written to
eval.json there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from bnjax.training.errors import run_reporting


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit status."""

    def run() -> None:
        import tyro

        def arguments(
            workdir: Annotated[Path, tyro.conf.Positional], data_dir: Path | None = None
        ) -> tuple[Path, Path | None]:
            """Evaluate the newest checkpoint of a run on its test set.

            Args:
                workdir: The folder that train.py wrote.
                data_dir: Where TensorFlow Datasets are, if not where the run had them.
            """
            return workdir, data_dir

        args = list(sys.argv[1:] if argv is None else argv)
        workdir, data_dir = tyro.cli(arguments, prog="eval.py", args=args)

        from bnjax.training.evaluation import evaluate_run

        evaluate_run(workdir, data_dir)

    return run_reporting(run)


if __name__ == "__main__":
    sys.exit(main())
