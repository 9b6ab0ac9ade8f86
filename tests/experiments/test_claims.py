"""The experiments that take seconds, whole or in miniature, against what must hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adabn, bias_drift, population, scale_invariance, smoothness
from experiments.runs import preset


def test_a_bias_outside_the_gradient_grows_by_a_line():
    found = bias_drift.measure()
    outside = found["mean outside the gradient"]
    slope = found["bias_per_step_predicted"]
    steps = np.asarray(found["steps"])
    np.testing.assert_allclose(outside["bias"], slope * steps, rtol=1e-3)
    assert outside["loss"][-1] == pytest.approx(outside["loss"][20], rel=1e-3)
    for name in ("mean inside the gradient", "batch normalization (both inside)"):
        assert np.abs(found[name]["bias"]).max() < 1e-3 * slope * steps[-1]
    both = found["mean and deviation outside"]
    assert both["weight"][-1] > 1.5 * both["weight"][len(steps) // 4] > 10


@pytest.mark.slow
def test_scale_of_the_weights():
    found = scale_invariance.measure()
    exact, usual = found["epsilon 1e-20"], found["epsilon 1e-5"]
    for identity in scale_invariance.IDENTITIES:
        assert max(exact[identity]) < 1e-6
        assert usual[identity][0] > 0.5
    small = np.asarray(found["a"]) < 0.1
    np.testing.assert_allclose(
        np.asarray(usual["output"])[small],
        np.asarray(found["output_predicted"])[small],
        rtol=1e-2,
    )


@pytest.mark.slow
def test_population_statistics_after_few_steps_and_for_averaged_parameters():
    changes = {"steps": 20, "parallel": "single", "bn.momentum": 0.99}
    changes |= {"model.hidden": (30,), "model.weight_std": 0.1}
    config = preset("digits", changes)
    found = population.steps(config)
    assert [len(values) for values in found.values()] == [2, 2, 2]
    moving, paper, pooled = (values[-1] for values in found.values())
    assert min(paper, pooled) > moving + 0.1
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [smoothness.WITHOUT, smoothness.NOISY])
def test_smoothness_along_a_short_run(name, monkeypatch):
    changes = {"steps": 40, "model.hidden": (30, 20, 10), "model.weight_std": 0.1}
    config = preset("digits", changes | {"parallel": "single"})
    monkeypatch.setattr(smoothness, "settings", lambda *_: config)
    monkeypatch.setattr(smoothness, "TIMES", 2)
    smoothness.make_task.cache_clear()
    smoothness.make_network.cache_clear()
    found = smoothness.measured(smoothness.MNIST, name, config)
    assert found["step"] == [0, 20]
    assert np.shape(found["losses_on_the_line"]) == (2, 8)
    # The shortest of the steps down the gradient goes down.
    assert found["losses_on_the_line"][0][0] < found["loss"][0]
    np.testing.assert_allclose(np.array(found["shift_cosine"])[:, 0], 1, rtol=1e-5)
    table = smoothness.summary([found] * 3)
    expected = np.exp(np.log(found["beta"]).mean())
    assert table["beta_geometric_mean"]["median"] == pytest.approx(expected, rel=1e-4)
    smoothness.make_task.cache_clear()
    smoothness.make_network.cache_clear()
