"""More than a hundred layers: ResNet-110 with and without batch normalization.

    python -m experiments.depth

Trains the presets `cifar10-resnet20` and `cifar10-resnet110` with and without batch
normalization, all for the same number of steps of 32 examples. Without batch
normalization, it also uses a tenth and a hundredth of the learning rate. Writes
experiments/results/depth.json and docs/figures/depth.png. A second start trains only
runs that are not in runs/experiments. CIFAR-10 (JPEG) must be prepared: see
docs/programs/data.md.
"""

import functools
from typing import Any

import numpy as np

from benchmarks.figures import COLORS, WITH, WITHOUT, Figure, mark, new_figure, seeds_of
from benchmarks.report import run_command
from bnjax.training.config import Config
from experiments.cifar10 import CACHE
from experiments.runs import changed, finish, once, preset, rounded, run_once

DEPTHS = {20: "--", 110: "-"}
RATES = {WITH: (0.1,), WITHOUT: (0.1, 0.01, 0.001)}
BATCH = 32


def networks(steps: int, width: float) -> dict[str, Config]:
    """Return the networks at each learning rate, by name."""
    changes = {
        "steps": steps,
        "batch_size": BATCH,
        "eval_every": max(steps // 4, 1),
        "checkpoint_every": steps,
        "log_every": 25,
        "compilation_cache": CACHE,
        "model.width": width,
        "optim.schedule": "constant_schedule",
        "optim.schedule_options": {},
        "optim.warmup_steps": 0,
    }
    return {
        f"ResNet-{depth} {name}, {rate:g}": preset(
            f"cifar10-resnet{depth}",
            changes | {"batch_norm": name == WITH, "learning_rate": rate},
        )
        for depth in DEPTHS
        for name, rates in RATES.items()
        for rate in rates
    }


def reproduce(
    steps: int = 1500,
    width: float = 0.5,
    seed: int = 0,
) -> None:
    """Train, then write the result and the figure.

    Args:
        steps: Of each run.
        width: Factor on the channels of every layer.
        seed: Of the weights and the order of the data.
    """
    runs = {
        name: once(
            "depth",
            changed(config, {"seed": seed}),
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
    finish("depth", result, [seed], draw)


def row(run: dict[str, Any]) -> dict[str, Any]:
    """Return how far a run came: the mean loss of its last tenth."""
    losses = run["train_loss"]
    last = losses[-max(len(losses) // 10, 1) :]
    return {
        "train_loss_of_last_tenth": rounded(float(np.mean(last))) if last else None,
        "test_accuracy": run["final_test_accuracy"],
        "diverged": run["diverged"],
    }


def draw(record: dict[str, Any]) -> Figure:
    """Draw the training losses, each network's at its best learning rate."""
    result = record["result"]
    chance = np.log(10)
    figure, axes = new_figure()
    axes.plot((0, result["steps"]), (chance, chance), color="gray", ls=":", lw=1)
    for depth, style in DEPTHS.items():
        for name in RATES:
            tried = {
                run: row["train_loss_of_last_tenth"]
                for run, row in result["table"].items()
                if run.startswith(f"ResNet-{depth} {name},")
                and row["train_loss_of_last_tenth"] is not None
            }
            if not tried:
                continue
            best = min(tried, key=tried.__getitem__)
            run, color = result["runs"][best], COLORS[name]
            label = f"{best}" + (" (not finite in the end)" if run["diverged"] else "")
            axes.plot(
                run["train_steps"], run["train_loss"], style, color=color, label=label
            )
            if name == WITH:
                end = (run["train_steps"][-1], run["train_loss"][-1])
                mark(axes, end, f"{tried[best]:.2f}", color)
    mark(axes, (result["steps"], chance), f"chance\n{chance:.2f}", "gray")
    axes.set(
        title=f"CIFAR-10 (JPEG), ResNets of {result['width']:g} of the width: training "
        f"loss,\nlabelled with the mean of the last tenth, {seeds_of(record)}",
        xlabel=f"training steps of {BATCH} examples",
        ylabel="cross-entropy",
        xlim=(0, 1.12 * result["steps"]),
        ylim=(1.65, 2.85),
    )
    axes.legend(title="network and learning rate, the best of those tried")
    return figure


if __name__ == "__main__":
    run_command(reproduce)
