"""The effect of each change of section 4.2.1, at the size of CIFAR-10.

    python -m experiments.cifar10_changes

Trains the preset `cifar10-bn-x5` with each of its changes undone, one at a time. Small
images are shifted and mirrored, without a change of colors. The change of photometric
distortion is therefore measured with the crops and colors of the ImageNet presets, and
compared with a BN-x5 that has them too. Writes experiments/results/cifar10_changes.json
and docs/figures/cifar10_changes.png. A second start trains only runs that are not in
runs/experiments. CIFAR-10 (JPEG) must be prepared: see docs/programs/data.md.
"""

from typing import Any

from benchmarks.figures import CLEAR, Figure, new_figure, seeds_of
from benchmarks.report import percent, run_command
from bnjax.training.config import Config
from experiments.cifar10 import networks, trained
from experiments.runs import changed, finish, median, rounded

REFERENCE, CROPPED = "BN-x5", "BN-x5 on crops"


def variants() -> dict[str, Config]:
    """Return BN-x5, and BN-x5 without each of its changes."""
    base, ours = networks()["Inception"], networks()[REFERENCE]

    decay = ours.optim.schedule_options
    slower = {**decay, "transition_steps": 6 * decay["transition_steps"]}
    crops = {"data.image_size": 32, "data.augment.kind": "crop"}
    full = {"data.augment.strength": base.data.augment.strength}
    changes = {
        REFERENCE: {},
        "the lower learning rate": {"learning_rate": base.learning_rate},
        "dropout": {"model.dropout": base.model.dropout},
        "the larger L2 weight": {"optim.weight_decay": base.optim.weight_decay},
        "the slower decay": {"optim.schedule_options": slower},
        "local response normalization": {"model.local_response_norm": True},
        "batches that always meet": {"data.shuffle": base.data.shuffle},
        CROPPED: crops,
        "crops with the full distortion": crops | full,
    }
    return {name: changed(ours, each) for name, each in changes.items()}


def reproduce(seeds: int = 1) -> None:
    """Train all variants, then write the result and the figure.

    Args:
        seeds: How many runs of each.
    """
    runs = {
        name: [trained(changed(config, {"seed": seed})) for seed in range(seeds)]
        for name, config in variants().items()
    }
    result = {"table": table(runs), "runs": runs}
    finish("cifar10_changes", result, range(seeds), draw)


def table(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return each variant's last accuracy, and what it differs by from BN-x5's."""
    last = {
        name: [run["final_test_accuracy"] for run in each]
        for name, each in runs.items()
    }
    rows = {}
    for name, accuracy in last.items():
        against = median(last[CROPPED if "crops" in name else REFERENCE])
        rows[name] = {
            "accuracy": median(accuracy),
            "points_from_reference": rounded(100 * (median(accuracy) - against)),
            "by_seed": accuracy,
        }
    return rows


def draw(record: dict[str, Any]) -> Figure:
    """Draw what each variant loses or gains."""
    rows = record["result"]["table"]
    figure, axes = new_figure()
    names = [name for name in rows if name not in (REFERENCE, CROPPED)][::-1]
    points = [rows[name]["points_from_reference"] for name in names]
    ours, cropped = (percent(rows[name]["accuracy"]) for name in (REFERENCE, CROPPED))
    labels = [
        f"{name}\n(from {cropped} % on crops)" if "crops" in name else name
        for name in names
    ]
    colors = ["C3" if change < 0 else "C2" for change in points]
    bars = axes.barh(labels, points, color=colors)
    axes.bar_label(bars, [f"{change:+.1f}" for change in points], padding=3, **CLEAR)
    axes.axvline(0, color="black", lw=1)
    axes.margins(x=0.15)
    axes.set(
        title=f"CIFAR-10 (JPEG), BN-x5 of an eighth of the width\n({ours} %) "
        f"with one change taken back, {seeds_of(record)}",
        xlabel="test accuracy, points from BN-x5",
    )
    return figure


if __name__ == "__main__":
    run_command(reproduce)
