"""More than a hundred layers: ResNet-110 with and without batch normalization.

    python -m experiments.depth

Trains the presets `cifar10-resnet20` and `cifar10-resnet110` with and without batch
normalization for as many steps of 32 examples, without at a tenth and a hundredth of
the learning rate too. Writes experiments/results/depth.json and
docs/figures/depth.png. Started again, it trains only what is not in runs/experiments.
CIFAR-10 (JPEG) has to be prepared: see docs/data.md.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from experiments.cifar10 import CACHE
from experiments.figures import COLORS, WITH, WITHOUT, new_figure, save
from experiments.runs import once, rounded, run_once

RESULT = ROOT / "experiments" / "results" / "depth.json"
DEPTHS = {20: "--", 110: "-"}
RATES = {WITH: (0.1,), WITHOUT: (0.1, 0.01, 0.001)}
BATCH = 32


def networks(steps: int, width: float) -> dict[str, Config]:
    """Return the networks at each learning rate, by name."""
    configs = {}
    for depth in DEPTHS:
        base = PRESETS[f"cifar10-resnet{depth}"].config
        base = dataclasses.replace(
            base,
            steps=steps,
            batch_size=BATCH,
            eval_every=max(steps // 4, 1),
            checkpoint_every=steps,
            log_every=25,
            compilation_cache=CACHE,
            model=dataclasses.replace(base.model, width=width),
            optim=dataclasses.replace(
                base.optim,
                schedule="constant_schedule",
                schedule_options={},
                warmup_steps=0,
            ),
        )
        for name, rates in RATES.items():
            for rate in rates:
                configs[f"ResNet-{depth} {name}, {rate:g}"] = dataclasses.replace(
                    base, batch_norm=name == WITH, learning_rate=rate
                )
    return configs


def reproduce(
    steps: int = 1500,
    width: float = 0.5,
    seed: int = 0,
    data_dir: Path | None = None,
) -> None:
    """Train, then write the result and the figure.

    Args:
        steps: Of each run.
        width: Factor on the channels of every layer.
        seed: Of the weights and the order of the data.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    runs = {
        name: once(
            "depth",
            dataclasses.replace(config, seed=seed, data_dir=data_dir),
            functools.partial(run_once, "depth"),
        )
        for name, config in networks(steps, width).items()
    }
    result = {
        "table": {name: row(run) for name, run in runs.items()},
        "steps": steps,
        "width": width,
        "runs": runs,
    }
    command = " ".join(["python -m experiments.depth", *sys.argv[1:]])
    write_result(RESULT, command, [seed], result)
    print(f"{RESULT}\n{draw(runs)}")


def row(run: dict[str, Any]) -> dict[str, Any]:
    """Return how far a run came: the mean loss of its last tenth."""
    losses = run["train_loss"]
    last = losses[-max(len(losses) // 10, 1) :]
    return {
        "train_loss_of_last_tenth": rounded(float(np.mean(last))) if last else None,
        "test_accuracy": run["final_test_accuracy"],
        "diverged": run["diverged"],
    }


def draw(runs: dict[str, Any]) -> Path:
    """Draw the training losses, each network's at its best learning rate."""
    figure, axes = new_figure()
    lowest = []
    for depth, style in DEPTHS.items():
        for name in RATES:
            start = f"ResNet-{depth} {name},"
            tried = [
                run
                for key, run in runs.items()
                if key.startswith(start) and run["train_loss"]
            ]
            if not tried:
                continue
            best = min(tried, key=lambda run: row(run)["train_loss_of_last_tenth"])
            label = f"ResNet-{depth}, {name}"
            if best["diverged"]:
                label += " (not finite in the end)"
            steps, losses = best["train_steps"], best["train_loss"]
            lowest.append(min(losses))
            axes.plot(steps, losses, style, color=COLORS[name], label=label)
    axes.axhline(np.log(10), color="gray", ls=":", lw=1)
    axes.annotate("chance", (0, np.log(10)), xytext=(2, 3), textcoords="offset points")
    axes.set(
        title="CIFAR-10 (JPEG): training loss by depth",
        xlabel=f"training steps of {BATCH} examples",
        ylabel="cross-entropy",
        ylim=(0.95 * min(lowest), 2.6),
    )
    axes.legend()
    return save(figure, "depth")


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
