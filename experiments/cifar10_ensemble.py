"""Figure 4 of the paper at the size of CIFAR-10: six networks, and many crops.

    python -m experiments.cifar10_ensemble

Trains the presets `cifar10-ensemble-1` to `-6` and evaluates each of them and their
ensemble on 1, 10 and 144 crops. Writes experiments/results/cifar10_ensemble.json; the
runs stay in runs/experiments/cifar10-ensemble-*, and an existing run is not trained
again. CIFAR-10 (JPEG) must be prepared: see docs/programs/data.md.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import run_command
from bnjax.training.evaluation import evaluate_runs
from bnjax.training.loop import train
from bnjax.training.workdir import CONFIG, SUMMARY
from experiments.cifar10 import CACHE
from experiments.runs import RUNS, finish, preset

MEMBERS = 6
CROPS = (1, 10, 144)
# Top-1 error (%) on ImageNet: one network on one crop, on 144, six on 144.
PAPER = {"one network, 1 crop": 25.2, "one network, 144": 21.99, "six, 144": 20.1}


def reproduce() -> None:
    """Train the members, evaluate, and write the result."""
    workdirs = [member(number) for number in range(1, MEMBERS + 1)]
    scores = {str(crops): evaluated(workdirs, crops) for crops in CROPS}
    seeds = [preset(workdir.name).seed for workdir in workdirs]
    result = {"by_crops": scores, "paper_top1_error_on_imagenet": PAPER}
    finish("cifar10_ensemble", result, seeds)


def member(number: int) -> Path:
    """Train one network, or go on with it; return its folder."""
    name = f"cifar10-ensemble-{number}"
    workdir = RUNS / name
    if not (workdir / SUMMARY).exists():
        changes = {
            "workdir": workdir,
            "resume": (workdir / CONFIG).exists(),
            "compilation_cache": CACHE,
        }
        train(name, preset(name, changes))
    return workdir


def evaluated(workdirs: list[Path], crops: int) -> dict[str, Any]:
    """Return what eval.py says of the networks and of their mean."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ensemble.json"
        found = evaluate_runs(workdirs, crops=crops, output=output)
    members = [
        member | {"workdir": Path(member["workdir"]).name}
        for member in found["members"]
    ]
    return found | {"members": members}


if __name__ == "__main__":
    run_command(reproduce)
