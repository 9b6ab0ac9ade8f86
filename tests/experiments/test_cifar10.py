"""The experiments on CIFAR-10: their configurations, and tables of made-up runs."""

import dataclasses

import pytest

from bnjax.training.config import validate
from experiments import cifar10, cifar10_changes, depth, lenet, runs


def made_up(accuracy, diverged=None):
    return {
        "steps": [500 * (i + 1) for i in range(len(accuracy))],
        "test_accuracy": accuracy,
        "final_test_accuracy": None if diverged else accuracy[-1],
        "diverged": diverged,
    }


def flat(config, prefix=""):
    """Return the fields of a configuration by their dotted names."""
    fields = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        nested = dataclasses.is_dataclass(value)
        fields |= flat(value, name + ".") if nested else {name: value}
    return fields


def test_steps_are_counted_to_the_best_of_the_median_baseline():
    curves = {
        "Inception": ([0.2, 0.5, 0.4, 0.6], [0.1, 0.4, 0.5, 0.5], [0.3, 0.3, 0.3, 0.9]),
        "BN-x5": ([0.55, 0.7, 0.65, 0.65],),
        "BN-x30": ([0.6, 0.6],),
        "BN-x5-Sigmoid": ([0.1, 0.2],),
    }
    found = {
        name: [made_up(each) for each in several] for name, several in curves.items()
    }
    too_fast = "Inception, 5 times the rate"
    rows = cifar10.table(found | {too_fast: [made_up([], diverged="the loss is nan")]})
    counted = {n: row["steps_to_best_of_inception"] for n, row in rows.items()}
    assert list(counted.values()) == [2000, 1000, 500, None, None]
    shares = [row["over_steps_of_inception"] for row in rows.values()]
    assert shares == [1.0, 0.5, 0.25, None, None]
    assert rows["Inception"]["best_accuracy"] == 0.6
    assert rows[too_fast]["best_accuracy"] is None
    assert rows["BN-x5"]["paper_over_steps_of_inception"] == pytest.approx(0.0677, 1e-2)


def test_one_change_at_a_time():
    ours = flat(cifar10.networks()["BN-x5"])
    changed = {
        name: {key for key, value in flat(config).items() if value != ours[key]}
        for name, config in cifar10_changes.variants().items()
    }
    crops = {"data.image_size", "data.augment.kind"}
    assert changed == {
        "BN-x5": set(),
        "the lower learning rate": {"learning_rate"},
        "dropout": {"model.dropout"},
        "the larger L2 weight": {"optim.weight_decay"},
        "the slower decay": {"optim.schedule_options"},
        "local response normalization": {"model.local_response_norm"},
        "batches that always meet": {"data.shuffle"},
        "BN-x5 on crops": crops,
        "crops with the full distortion": crops | {"data.augment.strength"},
    }


def test_each_is_compared_with_its_own_reference():
    names = ("BN-x5", "dropout", "BN-x5 on crops", "crops with the full distortion")
    accuracy = dict(zip(names, (0.7, 0.65, 0.5, 0.52), strict=True))
    rows = cifar10_changes.table({k: [made_up([v])] for k, v in accuracy.items()})
    points = [rows[name]["points_from_reference"] for name in names]
    assert points == pytest.approx([0, -5, 0, 2])


def test_every_run_is_one_that_train_py_takes():
    on_cifar10 = [
        *cifar10.networks().values(),
        *cifar10_changes.variants().values(),
        *depth.networks(100, 0.5).values(),
    ]
    for config in [*on_cifar10, *lenet.networks("lenet-mnist").values()]:
        validate(config)
    assert {config.data.name for config in on_cifar10} == {"cifar10_jpeg"}


def test_the_data_are_named_here_whatever_the_preset_has(monkeypatch):
    name = "cifar10-bn-x5"
    other = runs.changed(runs.preset(name), {"data.name": "cifar10", "steps": 7})
    named = dataclasses.replace(runs.PRESETS[name], config=other)
    monkeypatch.setitem(runs.PRESETS, name, named)
    config = runs.preset(name, {"model.width": 0.5, "model.dropout": 0.1})
    assert (config.data.name, config.steps) == ("cifar10_jpeg", 7)
    assert (config.model.width, config.model.dropout) == (0.5, 0.1)
