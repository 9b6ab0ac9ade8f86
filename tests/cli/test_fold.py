"""Folded weights written: without normalization they give the same logits."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from bnjax.training.evaluation import load_run


def logits_by_hand(weights, x):
    """The MLP written out: matrix products and sigmoids alone."""
    z = x.reshape(len(x), -1)
    for name in ("dense_0", "dense_1"):
        u = z @ weights[f"params/{name}/kernel"] + weights[f"params/{name}/bias"]
        z = 1 / (1 + np.exp(-u))
    return z @ weights["params/logits/kernel"] + weights["params/logits/bias"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights(trained, run, tmp_path, suffix):
    out = tmp_path / f"folded{suffix}"
    printed = run("fold", trained("digits"), out)
    weights = dict(np.load(out)) if suffix == ".npz" else load_file(out)
    program, state = load_run(trained("digits")).restore()
    x = np.random.default_rng(0).uniform(size=(9, 8, 8))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    expected = jax.jit(lambda v, x: program.model.apply(v, x, train=False))(
        variables, np.float32(x)
    )
    found = logits_by_hand(weights, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    report = json.loads((tmp_path / "folded.json").read_text())
    assert (report["workdir"], report["step"]) == (str(trained("digits")), 60)
    assert report["weights"] == {
        name: {"shape": list(leaf.shape), "dtype": "float32"}
        for name, leaf in weights.items()
    }
    layers = [(each["path"], each["into"], each["folded"]) for each in report["layers"]]
    assert layers == [
        ("bn_0", "dense_0/kernel", True),
        ("bn_1", "dense_1/kernel", True),
    ]
    assert 0 < report["largest_difference"] < 1e-5
    assert [line.split()[:2] for line in printed.splitlines()[1:3]] == [
        ["bn_0", "dense_0/kernel"],
        ["bn_1", "dense_1/kernel"],
    ]


def test_bfloat16(trained, run, fails, tmp_path):
    out = tmp_path / "folded.safetensors"
    run("fold", trained("digits"), out, "--dtype", "bfloat16")
    report = json.loads((tmp_path / "folded.json").read_text())
    assert {each["dtype"] for each in report["weights"].values()} == {"bfloat16"}
    assert 1e-5 < report["largest_difference"] < 0.1
    argv = ["fold", trained("digits"), tmp_path / "other.npz", "--dtype", "bfloat16"]
    assert "do not support bfloat16" in fails(*argv, status=2)
    assert not (tmp_path / "other.json").exists()


def test_faults(trained, fails, tmp_path):
    argv = ["fold", trained("digits")]
    message = fails(*argv, tmp_path / "a.safetensor", status=2)
    assert "expected .npz or .safetensors. Did you mean '.safetensors'?" in message
    (tmp_path / "a.json").write_text("old")
    message = fails(*argv, tmp_path / "a.npz", status=2)
    assert f"{tmp_path / 'a.json'} exists already" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
