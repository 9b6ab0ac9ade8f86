"""Runs that start from the network of another."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from bnjax.data.config import DataConfig, SettingError
from bnjax.data.sources import open_data, open_source
from bnjax.interop.torch import TorchError, to_torch
from bnjax.interop.torch_files import write_state_dict
from bnjax.training.config import ModelConfig
from bnjax.training.evaluation import (
    PopulationEstimator,
    average_needs_stats,
    average_params,
    load_run,
)
from bnjax.training.loop import Run, train
from bnjax.training.step import tree_sha256

SEVEN = DataConfig(name="synthetic:8x8x1:7:256")


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train("digits", dataclasses.replace(small_config, workdir=workdir))
    return workdir


@pytest.fixture
def start(small_config, trained):
    def start(**changes):
        changes = {"init_from": trained, "seed": 5} | changes
        config = dataclasses.replace(small_config, **changes)
        return Run(config, open_data(config.data))

    return start


def state_of(workdir):
    return load_run(workdir).restore()[1]


def test_everything_is_taken_but_the_step_and_the_optimizer(start, trained):
    run, old = start(), state_of(trained)
    assert tree_sha256(run.state.params) == tree_sha256(old.params)
    assert tree_sha256(run.state.batch_stats) == tree_sha256(old.batch_stats)
    assert int(run.state.step) == 0
    assert not jax.tree.leaves(run.state.opt_state)[-1].any()


def test_the_last_layer_is_new_for_other_classes(start, trained, capsys):
    run, old = start(data=SEVEN), state_of(trained)
    assert run.state.params["logits"]["kernel"].shape == (9, 7)
    for name in ("dense_0", "dense_1", "bn_0", "bn_1"):
        assert tree_sha256(run.state.params[name]) == tree_sha256(old.params[name])
    said = capsys.readouterr().err
    assert "starting from 6 of 8 arrays" in said
    assert "new: logits/bias, logits/kernel" in said


def test_reset_statistics_start_anew(start, trained):
    run = start(init_stats="reset")
    assert tree_sha256(run.state.params) == tree_sha256(state_of(trained).params)
    for layer in run.state.batch_stats.values():
        assert not layer["mean"].any()
        assert (layer["var"] == 1).all()


def test_adapted_statistics_move_on_from_where_they_are(start, trained):
    kept = start().config.bn.momentum
    moved = {}
    for stats in ("adapt", "reset"):
        run = start(init_stats=stats)
        run.dispatch(1)
        moved[stats] = run.state.batch_stats["bn_0"]["mean"]
    old = state_of(trained).batch_stats["bn_0"]["mean"]
    np.testing.assert_allclose(moved["adapt"], kept * old + moved["reset"], rtol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param({"parallel": "pmap", "devices": 2}, marks=pytest.mark.slow),
        {"parallel": "spmd", "devices": 5, "bn": "per-device"},
    ],
    ids=["one device", "accumulating", "pmap", "per device"],
)
def test_frozen_statistics_normalize_in_training(start, trained, layout):
    layout = dict(layout)
    if "bn" in layout:
        bn = dataclasses.replace(start().config.bn, sync=layout.pop("bn"))
        layout["bn"] = bn
    run, old = start(init_stats="freeze", **layout), state_of(trained)
    batch = run.program.gather(
        open_source("digits").load("train", print), run._feed.chunk(0, 1)[0]
    )
    variables = {"params": old.params, "batch_stats": old.batch_stats}
    logits = run.program.model.apply(variables, batch["image"], train=False)
    logits = np.asarray(logits, np.float64)
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -shares[np.arange(50), batch["label"]].mean()
    measured, _ = run.dispatch(3)
    assert measured["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert tree_sha256(run.state.batch_stats) == tree_sha256(old.batch_stats)
    assert tree_sha256(run.state.params) != tree_sha256(old.params)


def test_frozen_statistics_are_not_taken_again(start, trained):
    run = start(init_stats="freeze", ema=0.5)
    run.dispatch(2)
    assert not average_needs_stats(run.config)
    evaluated = average_params(run.config, run.state)
    assert tree_sha256(evaluated.batch_stats) == tree_sha256(
        state_of(trained).batch_stats
    )
    estimator = PopulationEstimator(
        run.config, run.program, run._feed, run._parallel, run._constants
    )
    with pytest.raises(SettingError, match="--batch-stats-from: the run was trained"):
        estimator.estimate(run.state, 3)


def test_it_learns_faster_than_from_nothing(start, small_config):
    fresh = Run(dataclasses.replace(small_config, seed=5), open_source("digits"))
    fresh.dispatch(10)
    tuned = start()
    tuned.dispatch(10)
    assert tuned.evaluate().loss < fresh.evaluate().loss


@pytest.mark.slow
def test_a_resumed_run_does_not_need_it_any_more(
    small_config, trained, tmp_path, capsys
):
    gone = tmp_path / "gone"
    shutil.copytree(trained, gone)
    config = dataclasses.replace(small_config, init_from=gone)
    whole = train("digits", dataclasses.replace(config, workdir=tmp_path / "whole"))
    short = dataclasses.replace(config, workdir=tmp_path / "run")
    train("digits", short)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    shutil.rmtree(gone)
    resumed = train("digits", dataclasses.replace(short, resume=True))
    assert "resuming at step 30" in capsys.readouterr().err
    assert resumed["state_sha256"] == whole["state_sha256"]


def test_another_network_is_refused(start):
    with pytest.raises(SettingError) as caught:
        start(model=ModelConfig(hidden=(12, 8), weight_std=0.1))
    message = str(caught.value)
    assert "bn_1/bias has the shape (9,), here (8,)" in message
    assert "logits/kernel has the shape (9, 10), here (8, 10)" in message
    assert "--model" in message


def test_a_network_without_normalization_is_refused(start):
    with pytest.raises(ValueError, match="bn_0/bias is unknown here"):
        start(batch_norm=False)
    with pytest.raises(ValueError, match="dense_0/bias is missing"):
        start(batch_norm=False)


def test_many_problems_are_counted(start):
    with pytest.raises(ValueError, match=r"; and \d+ more\. Give"):
        start(model=ModelConfig(hidden=(5, 6, 7, 8), weight_std=0.1))


def test_what_is_no_run_is_refused(start, tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a run"):
        start(init_from=tmp_path / "nowhere")


def test_a_run_whose_checkpoints_are_gone_is_refused(start, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for step in (30, 60):
        shutil.rmtree(copy / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        start(init_from=copy)


@pytest.fixture
def weights(trained, tmp_path):
    """The network's weights as PyTorch has them, and the file they are written to."""
    old = state_of(trained)
    variables = {"params": old.params, "batch_stats": old.batch_stats}
    return to_torch(variables), tmp_path / "weights.safetensors"


def test_weights_of_pytorch(start, trained, weights, capsys):
    (tensors, path), old = weights, state_of(trained)
    write_state_dict(path, tensors)
    state = start(init_from=path).state
    assert tree_sha256(state.params) == tree_sha256(old.params)
    assert tree_sha256(state.batch_stats) == tree_sha256(old.batch_stats)
    assert "starting from 8 of 8 arrays" in capsys.readouterr().err
    new = start(init_from=path, data=SEVEN).state.params
    assert tree_sha256(new["bn_1"]) == tree_sha256(old.params["bn_1"])
    assert new["logits"]["kernel"].shape == (9, 7)
    assert new["logits"]["kernel"].std() > 0
    assert "new: logits/bias, logits/kernel" in capsys.readouterr().err


def test_weights_of_another_network(start, weights):
    tensors, path = weights
    write_state_dict(path, tensors | {"f.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(TorchError, match=r"no place for f\.weight") as caught:
        start(init_from=path)
    assert "--init-from" in str(caught.value)
    assert "import-torch with --mapping" in str(caught.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TorchError, match="damaged"):
        start(init_from=path)


def test_nothing_is_written_where_it_fails(small_config, tmp_path):
    workdir = tmp_path / "run"
    config = dataclasses.replace(small_config, init_from=tmp_path, workdir=workdir)
    with pytest.raises(ValueError, match="--init-from"):
        train("digits", config)
    train("digits", dataclasses.replace(config, init_from=None))
