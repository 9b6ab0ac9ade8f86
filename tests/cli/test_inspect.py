"""The table of BN layers: every figure against the checkpoint's own arrays."""

import numpy as np
import pytest

from bnjax.training.evaluation import load_run
from bnjax.training.runs import find_layers


def test_figures_are_those_of_the_checkpoint(trained, run):
    workdir = trained("digits")
    _, state = load_run(workdir).restore()
    below = {}
    for name, tree in (("scale", state.params), ("var", state.batch_stats)):
        values = [tree[layer][name] for layer in ("bn_0", "bn_1")]
        below[name] = float(np.percentile(np.concatenate(values), 20))
    flags = [word for name in below for word in (f"--{name}-below", below[name])]
    found = run("inspect", workdir, "--json", *flags)
    assert (found["workdir"], found["step"]) == (str(workdir), 60)
    assert (found["scale_below"], found["var_below"]) == (*below.values(),)
    assert [layer["path"] for layer in found["layers"]] == ["bn_0", "bn_1"]
    assert [layer["features"] for layer in found["layers"]] == [12, 9]
    for layer in found["layers"]:
        values = {**state.params[layer["path"]], **state.batch_stats[layer["path"]]}
        for name, array in values.items():
            expected = {"min": float(array.min()), "max": float(array.max())}
            assert layer[name] == expected
        silent, flat = (values[name] < below[name] for name in below)
        assert layer["scale_near_zero"] == silent.sum()
        assert layer["var_near_zero"] == flat.sum()
        assert layer["dead"] == (silent | flat).sum()
    assert 0 < sum(layer["dead"] for layer in found["layers"]) < 21


def test_table(trained, run):
    lines = run("inspect", trained("digits")).splitlines()
    assert lines[0] == f"{trained('digits')}, step 60: 2 BN layers"
    header = ["layer", "features", "scale", "bias", "mean", "var", "dead"]
    assert lines[1].split() == header
    assert lines[2].split()[:2] == ["bn_0", "12"]
    assert lines[3].split()[:2] == ["bn_1", "9"]
    # The epsilon of the run.
    assert lines[4] == (
        "0 of 21 units are dead: |scale| below 0.001 or var below 1e-05."
    )


def test_layers_of_all_kinds():
    ones = np.ones(2, np.float32)
    stats = {
        "block": {f"bn_{n}": {"mean": ones, "var": ones} for n in (10, 9)},
        "plain": {"mean": ones, "var": np.float32([0, 1])},
        "other": {"mean": ones, "matrix": ones},
    }
    # At every position of unit 0, and at one of unit 1, the scale is 0.
    scale = np.float32([[[0, 0], [0, -3]]])
    params = {"block": {"bn_9": {"scale": scale, "bias": ones}}}
    layers = find_layers(params, stats)
    assert [each["path"] for each in layers] == ["block/bn_9", "block/bn_10", "plain"]
    nine, ten, plain = layers
    assert (nine["scale_near_zero"], nine["dead"]) == (1, 1)
    assert nine["scale"] == {"min": -3, "max": 0}
    assert (ten["scale"], ten["bias"], ten["dead"]) == (None, None, 0)
    assert (plain["var_near_zero"], plain["dead"]) == (1, 1)
    [top] = find_layers({}, {"mean": ones, "var": ones})
    assert top["path"] == "(top level)"


def test_a_network_without_batch_norm(trained, run, monkeypatch):
    assert find_layers({"dense_0": {"kernel": np.ones(3)}}, {}) == []
    monkeypatch.setattr("bnjax.training.runs.find_layers", lambda *a, **k: [])
    assert "no layer has a running mean" in run("inspect", trained("digits"))
    assert run("inspect", trained("digits"), "--json")["layers"] == []


@pytest.mark.parametrize("flag", ["--scale-below", "--var-below"])
def test_faults(flag, fails, tmp_path):
    assert "is not a run" in fails("inspect", tmp_path)
    assert f"{flag} -1.0: expected 0 or more" in fails(
        "inspect", tmp_path, flag, -1, status=2
    )
