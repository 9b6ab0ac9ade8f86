"""The figures of docs, drawn from the result files.

python -m experiments.figures
python -m experiments.figures --names depth cifar10
"""

import importlib

from benchmarks.figures import save
from benchmarks.report import ROOT, read_result, run_command

DRAWN = ("adabn", "batch_size", "bias_drift", "cancellation", "cifar10")
DRAWN += ("cifar10_changes", "depth", "jacobian", "mnist", "population")
DRAWN += ("scale_invariance", "smoothness")
RESULTS = {name: ROOT / f"experiments/results/{name}.json" for name in DRAWN}
RESULTS["scaling"] = ROOT / "benchmarks/results/scaling-cpu.json"


def redraw(names: tuple[str, ...] = tuple(RESULTS)) -> None:
    """Draw what the result files hold.

    Args:
        names: Of figures.
    """
    for name in names:
        folder = RESULTS[name].parents[1].name
        module = importlib.import_module(f"{folder}.{name}")
        print(save(module.draw(read_result(RESULTS[name])), name))


if __name__ == "__main__":
    run_command(redraw)
