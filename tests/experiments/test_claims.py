"""The experiments that take seconds, against what the mathematics says."""

import numpy as np
import pytest

from experiments import bias_drift, scale_invariance


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
