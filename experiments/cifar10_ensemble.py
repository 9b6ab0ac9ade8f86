"""Figure 4 of the paper at the size of CIFAR-10: six networks, and many crops.

    python -m experiments.cifar10_ensemble

Trains the presets `cifar10-ensemble-1` to `-6` and evaluates each of them and all of
them together on one crop, on ten and on 144. Writes
experiments/results/cifar10_ensemble.json; the runs stay in
runs/experiments/cifar10-ensemble-*, and one that is there is not trained again.
CIFAR-10 (JPEG) has to be prepared: see docs/data.md.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.training.evaluation import evaluate_runs
from bnjax.training.loop import train
from bnjax.training.presets import PRESETS
from bnjax.training.workdir import CONFIG, SUMMARY
from experiments.cifar10 import CACHE
from experiments.runs import RUNS

RESULT = ROOT / "experiments" / "results" / "cifar10_ensemble.json"
MEMBERS = 6
CROPS = (1, 10, 144)
# Top-1 error (%) on ImageNet: one network on one crop, on 144, six on 144.
PAPER = {"one network, 1 crop": 25.2, "one network, 144": 21.99, "six, 144": 20.1}


def reproduce(data_dir: Path | None = None) -> None:
    """Train the members, evaluate, and write the result.

    Args:
        data_dir: Where TensorFlow Datasets are prepared.
    """
    workdirs = [member(number, data_dir) for number in range(1, MEMBERS + 1)]
    scores = {str(crops): evaluated(workdirs, crops, data_dir) for crops in CROPS}
    command = " ".join(["python -m experiments.cifar10_ensemble", *sys.argv[1:]])
    seeds = [PRESETS[workdir.name].config.seed for workdir in workdirs]
    result = {"by_crops": scores, "paper_top1_error_on_imagenet": PAPER}
    write_result(RESULT, command, seeds, result)
    print(RESULT)


def member(number: int, data_dir: Path | None) -> Path:
    """Train one network, or go on with it; return its folder."""
    preset = f"cifar10-ensemble-{number}"
    workdir = RUNS / preset
    if not (workdir / SUMMARY).exists():
        config = dataclasses.replace(
            PRESETS[preset].config,
            workdir=workdir,
            resume=(workdir / CONFIG).exists(),
            compilation_cache=CACHE,
            data_dir=data_dir,
        )
        train(preset, config)
    return workdir


def evaluated(
    workdirs: list[Path], crops: int, data_dir: Path | None
) -> dict[str, Any]:
    """Return what eval.py says of the networks and of their mean."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ensemble.json"
        found = evaluate_runs(workdirs, crops=crops, output=output, data_dir=data_dir)
    members = [
        member | {"workdir": Path(member["workdir"]).name}
        for member in found["members"]
    ]
    return found | {"members": members}


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
