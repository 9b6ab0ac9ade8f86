"""The tables of the experiments on CIFAR-10, from runs made up by hand."""

import dataclasses

import pytest

from bnjax.training.config import validate
from experiments import cifar10, cifar10_changes, depth, lenet


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
        if dataclasses.is_dataclass(value):
            fields |= flat(value, name + ".")
        else:
            fields[name] = value
    return fields


def test_steps_are_counted_to_the_best_of_the_median_baseline():
    runs = {
        "Inception": [
            made_up([0.2, 0.5, 0.4, 0.6]),
            made_up([0.1, 0.4, 0.5, 0.5]),
            made_up([0.3, 0.3, 0.3, 0.9]),
        ],
        "BN-x5": [made_up([0.55, 0.7, 0.65, 0.65])],
        "BN-x30": [made_up([0.6, 0.6])],
        "BN-x5-Sigmoid": [made_up([0.1, 0.2])],
        "Inception, 5 times the rate": [made_up([], diverged="the loss became nan")],
    }
    rows = cifar10.table(runs)
    assert rows["Inception"]["best_accuracy"] == 0.6
    assert rows["Inception"]["steps_to_best_of_inception"] == 2000
    assert rows["BN-x5"]["steps_to_best_of_inception"] == 1000
    assert rows["BN-x5"]["over_steps_of_inception"] == 0.5
    assert rows["BN-x30"]["over_steps_of_inception"] == 0.25
    assert rows["BN-x5-Sigmoid"]["steps_to_best_of_inception"] is None
    assert rows["Inception, 5 times the rate"]["best_accuracy"] is None
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
    accuracy = {
        "BN-x5": 0.7,
        "dropout": 0.65,
        "BN-x5 on crops": 0.5,
        "crops with the full distortion": 0.52,
    }
    rows = cifar10_changes.table({k: [made_up([v])] for k, v in accuracy.items()})
    points = {name: row["points_from_reference"] for name, row in rows.items()}
    assert points["dropout"] == pytest.approx(-5)
    assert points["crops with the full distortion"] == pytest.approx(2)


def test_every_run_is_one_that_train_py_takes():
    for config in [
        *cifar10.networks().values(),
        *cifar10_changes.variants().values(),
        *depth.networks(100, 0.5).values(),
        *lenet.networks("lenet-mnist").values(),
    ]:
        validate(config)
