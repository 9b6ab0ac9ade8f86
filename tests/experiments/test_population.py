"""What the experiments on population statistics measure, in miniature."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.training.presets import PRESETS
from experiments import adabn, figures, population


@pytest.fixture
def config():
    base = PRESETS["digits"].config
    return dataclasses.replace(
        base,
        steps=20,
        parallel="single",
        bn=dataclasses.replace(base.bn, momentum=0.99),
        model=dataclasses.replace(base.model, hidden=(30,), weight_std=0.1),
    )


def test_population_statistics_after_few_steps(config):
    found = population.steps(config)
    assert [len(values) for values in found.values()] == [2, 2, 2]
    moving, paper, pooled = (values[-1] for values in found.values())
    assert paper > moving + 0.1
    assert pooled > moving + 0.1


def test_averaged_parameters(config):
    found = population.averaged(config)
    assert [len(values) for values in found.values()] == [1, 1, 1, 1]
    assert found[population.OWN][0] > found[population.STALE][0]


def test_images_of_other_kinds():
    x = jnp.zeros((2, 9, 9, 1)).at[:, 4, 4].set(1.0)
    blurred = adabn.blurred(x)
    np.testing.assert_allclose(blurred[0, 1:8, 1:8, 0], np.full((7, 7), 1 / 49), 1e-6)
    assert float(blurred.sum()) == pytest.approx(2)
    noise = adabn.noisy(x) - x
    assert float(noise.std()) == pytest.approx(0.5, rel=0.2)
    assert float(abs(noise[0] - noise[1]).max()) > 0


def test_figures_from_made_up_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    runs = [
        {"accuracy": {d: dict.fromkeys(adabn.COLORS, v) for d in adabn.DOMAINS}}
        for v in (0.2, 0.9, 0.5)
    ]
    median = adabn.table(runs)
    assert median["noisy"] == dict.fromkeys(adabn.COLORS, 0.5)
    assert adabn.draw({"runs": runs, "median": median}).exists()
    few = {name: [0.5] * 6 for name in population.COLORS}
    sizes = {
        str(size): [dict.fromkeys(population.METHODS, 0.4) | {population.MOVING: 0.3}]
        for size in population.SIZES
    }
    result = {
        "steps": population.STEPS,
        "after_steps": [few],
        "averaged_steps": population.AVERAGED_STEPS,
        "averaged_parameters": [few],
        "examples_seen": 1000,
        "batch_sizes": sizes,
    }
    assert population.draw(result).exists()
