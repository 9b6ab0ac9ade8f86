"""Evaluate runs of train.py, rebuilt from their folders alone.

python eval.py RUN               top-1 and top-5 of its newest checkpoint
python eval.py RUN --crops 144   averaged over GoogLeNet's crops of each image
python eval.py RUN1 RUN2         each, and their ensemble
python eval.py --help            every flag

docs/evaluation.md says more.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnjax.cli import run_reporting


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit status."""

    def run() -> None:
        import tyro

        def arguments(
            run: tyro.conf.Positional[Path],
            others: tyro.conf.Positional[tuple[Path, ...]] = (),
            crops: int = 1,
            batch_stats_from: int | None = None,
            output: Path | None = None,
            data_dir: Path | None = None,
        ) -> tuple[list[Path], dict[str, Any]]:
            """Score the newest checkpoint of a run on its test set.

            With several runs, each and their ensemble: class probabilities averaged.

            Args:
                run: RUN, a folder that train.py wrote.
                others: More of them, for an ensemble.
                crops: Of each image: 1 as the run itself evaluated, 10, or 144.
                batch_stats_from: Score by the moving averages of training, and by
                    population statistics over this many training batches.
                output: JSON goes here. None: to RUN/eval.json; an ensemble's nowhere.
                data_dir: Where tfds sets are. None: where the run had them.
            """
            options = {
                "crops": crops,
                "batch_stats_from": batch_stats_from,
                "output": output,
                "data_dir": data_dir,
            }
            return [run, *others], options

        args = list(sys.argv[1:] if argv is None else argv)
        workdirs, options = tyro.cli(arguments, prog="eval.py", args=args)

        from bnjax.training.evaluation import evaluate_runs

        evaluate_runs(workdirs, **options)

    return run_reporting(run)


if __name__ == "__main__":
    sys.exit(main())
