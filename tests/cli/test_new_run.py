"""Runs written from variables: whole or not there, and eval.py reads them."""

import json

import jax
import numpy as np
import pytest

from bnjax.data.pipeline import make_feed
from bnjax.training.config import RunError
from bnjax.training.evaluation import load_run
from bnjax.training.runs import check_new_run, write_run
from bnjax.training.step import Stream
from bnjax.training.workdir import LOCK, claim
from tests.cli.conftest import evaluated


@pytest.mark.parametrize("method", ["paper", "pooled"])
def test_statistics_of_the_first_layer(trained, run, tmp_path, method):
    opened = load_run(trained("digits"))
    _, before = opened.restore()
    new = tmp_path / "new"
    flags = ["--output", new, "--batches", 7, "--method", method]
    printed = run("recompute-stats", trained("digits"), *flags)
    assert printed.splitlines()[-1] == (
        f"{new} holds step 60 with statistics over 7 batches of 30: "
        f"python eval.py {new}"
    )
    _, after = load_run(new).restore()
    # What the steps of the training were given, in float64.
    feed = make_feed(
        opened.config.data,
        opened.source,
        batch_size=opened.config.batch_size,
        key=jax.random.fold_in(before.rng, Stream.ORDER),
    )
    kernel = np.float64(before.params["dense_0"]["kernel"])
    images = np.float64(feed.constants.images)[feed.chunk(0, 7)] / 16
    u = images.reshape(7, 30, -1) @ kernel
    mean = u.mean((0, 1))
    var = u.var(1).mean(0) * 30 / 29
    if method == "pooled":
        var = u.reshape(210, -1).var(0, ddof=1)
    stats = after.batch_stats["bn_0"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)
    kernels = [each.params["dense_1"]["kernel"] for each in (before, after)]
    np.testing.assert_array_equal(*kernels)
    recorded = json.loads((new / "config.json").read_text())
    assert recorded["preset"] == "digits"
    assert recorded["made_by"]["command"] == "recompute-stats"
    assert evaluated(new, tmp_path)["test_examples"] == 355


def test_some_layers(trained, run, fails, tmp_path):
    new = tmp_path / "new"
    flags = ["--output", new, "--batches", 2, "--layers"]
    run("recompute-stats", trained("digits"), *flags, "bn_1")
    (_, before), (_, after) = (
        load_run(each).restore() for each in (trained("digits"), new)
    )
    for name, changed in (("bn_0", False), ("bn_1", True)):
        pair = [state.batch_stats[name]["mean"] for state in (before, after)]
        assert np.any(pair[0] != pair[1]) == changed
    argv = ["recompute-stats", trained("digits"), *flags, "bn_9", "--force"]
    assert "bn_9" in fails(*argv)


def test_faults(trained, fails, tmp_path):
    argv = ["recompute-stats", trained("digits"), "--output"]
    assert "expected 1 or more" in fails(*argv, "x", "--batches", 0, status=2)
    message = fails(*argv, trained("digits"), "--force", status=2)
    assert "is the run itself" in message
    assert "does not exist" in fails(*argv, tmp_path / "no" / "new", status=2)
    (tmp_path / "file").write_text("old")
    message = fails(*argv, tmp_path, "--force", status=2)
    assert "exists and holds no run" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_replaced_or_left_as_it_was(trained, tmp_path, monkeypatch):
    opened = load_run(trained("digits"))
    _, state = opened.restore()
    new = tmp_path / "new"

    def write(**options):
        source, made_by = opened.source, {"command": "x"}
        write_run(new, "digits", opened.config, source, state, made_by, **options)

    def fail(*args, **kwargs):
        raise ValueError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("bnjax.training.checkpoint.Checkpoints.save", fail)
        with pytest.raises(ValueError, match="the disk is full"):
            write()
        assert list(tmp_path.iterdir()) == []
    new.mkdir()
    (new / LOCK).touch()
    write()
    (new / "eval.json").write_text("old")
    with pytest.raises(ValueError, match="holds a run already"):
        write()
    with monkeypatch.context() as patched:
        patched.setattr("bnjax.training.checkpoint.Checkpoints.save", fail)
        with pytest.raises(ValueError, match="the disk is full"):
            write(force=True)
        assert (new / "eval.json").exists()
    with claim(new, resume=True), pytest.raises(RunError, match="is being written"):
        write(force=True)
    write(force=True)
    assert sorted(path.name for path in new.iterdir()) == ["checkpoints", "config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(ValueError, match="holds a run already"):
        check_new_run(new)
