"""Which of the changes of section 4.2.1 matters, at the size of CIFAR-10.

    python -m experiments.cifar10_changes

Trains the preset `cifar10-bn-x5` with each of its changes taken back, one at a time.
Small images are shifted and mirrored, which leaves colours alone; the change of
photometric distortion is measured with the crops and colours of ImageNet's presets, so
that it stands beside a BN-x5 of its own. Writes
experiments/results/cifar10_changes.json and docs/figures/cifar10_changes.png. Started
again, it trains only what is not in runs/experiments. CIFAR-10 (JPEG) has to be
prepared: see docs/data.md.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.training.config import Config
from experiments.cifar10 import networks, trained
from experiments.figures import new_figure, save
from experiments.runs import rounded

RESULT = ROOT / "experiments" / "results" / "cifar10_changes.json"
REFERENCE, CROPPED = "BN-x5", "BN-x5 on crops"


def variants() -> dict[str, Config]:
    """Return BN-x5, and BN-x5 without each of its changes."""
    base, ours = networks()["Inception"], networks()[REFERENCE]

    def model(**changes: Any) -> Config:
        return dataclasses.replace(
            ours, model=dataclasses.replace(ours.model, **changes)
        )

    def optim(**changes: Any) -> Config:
        return dataclasses.replace(
            ours, optim=dataclasses.replace(ours.optim, **changes)
        )

    def crops(strength: float) -> Config:
        augment = dataclasses.replace(ours.data.augment, kind="crop", strength=strength)
        data = dataclasses.replace(ours.data, image_size=32, augment=augment)
        return dataclasses.replace(ours, data=data)

    decay = ours.optim.schedule_options
    slower = {**decay, "transition_steps": 6 * decay["transition_steps"]}
    fixed = dataclasses.replace(ours.data, shuffle=base.data.shuffle)
    return {
        REFERENCE: ours,
        "the lower learning rate": dataclasses.replace(
            ours, learning_rate=base.learning_rate
        ),
        "dropout": model(dropout=base.model.dropout),
        "the larger L2 weight": optim(weight_decay=base.optim.weight_decay),
        "the slower decay": optim(schedule_options=slower),
        "local response normalization": model(local_response_norm=True),
        "batches that always meet": dataclasses.replace(ours, data=fixed),
        CROPPED: crops(ours.data.augment.strength),
        "crops with the full distortion": crops(base.data.augment.strength),
    }


def reproduce(seeds: int = 1, data_dir: Path | None = None) -> None:
    """Train all variants, then write the result and the figure.

    Args:
        seeds: How many runs of each.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    runs = {
        name: [
            trained(dataclasses.replace(config, seed=seed, data_dir=data_dir))
            for seed in range(seeds)
        ]
        for name, config in variants().items()
    }
    result = {"table": table(runs), "runs": runs}
    command = " ".join(["python -m experiments.cifar10_changes", *sys.argv[1:]])
    write_result(RESULT, command, list(range(seeds)), result)
    print(f"{RESULT}\n{draw(result['table'])}")


def table(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return each variant's last accuracy, and what it differs by from BN-x5's."""
    last = {
        name: [run["final_test_accuracy"] for run in each]
        for name, each in runs.items()
    }
    rows = {}
    for name, accuracy in last.items():
        cropped = "crops" in name
        against = float(np.median(last[CROPPED if cropped else REFERENCE]))
        median = float(np.median(accuracy))
        rows[name] = {
            "accuracy": rounded(median),
            "points_from_reference": rounded(100 * (median - against)),
            "by_seed": accuracy,
        }
    return rows


def draw(rows: dict[str, Any]) -> Path:
    """Draw what each variant loses or gains."""
    figure, axes = new_figure()
    names = [name for name in rows if name not in (REFERENCE, CROPPED)][::-1]
    points = [rows[name]["points_from_reference"] for name in names]
    cropped = f" (of {100 * rows[CROPPED]['accuracy']:.1f} %)"
    labels = [name + cropped if "crops" in name else name for name in names]
    bars = axes.barh(labels, points, color=["C3" if p < 0 else "C2" for p in points])
    axes.bar_label(bars, [f"{p:+.1f}" for p in points], padding=3)
    axes.axvline(0, color="black", lw=1)
    axes.margins(x=0.15)
    axes.set(
        title=f"BN-x5 ({100 * rows[REFERENCE]['accuracy']:.1f} %) with one change back",
        xlabel="test accuracy, points from BN-x5",
    )
    return save(figure, "cifar10_changes")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
