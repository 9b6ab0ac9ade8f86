"""The moving average of the parameters, and what a run with one is evaluated with."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.data.sources import open_source
from bnjax.training.evaluation import Evaluator, average_params, evaluate_runs
from bnjax.training.loop import Run, train
from bnjax.training.step import Stream, stream_key, tree_sha256

DECAY = 0.9


def test_training_does_not_notice(small_config):
    def trained(config):
        run = Run(config, open_source("digits"))
        run.dispatch(20)
        return tree_sha256((run.state.params, run.state.batch_stats))

    with_average = dataclasses.replace(small_config, ema=DECAY)
    assert trained(with_average) == trained(small_config)


def oracle_statistics(run, params, batches):
    """Mean over batches of the moments of each layer's input, in float64."""
    state, program = run.state, run.program
    source = open_source("digits")
    arrays = source.load("train", print)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    key = stream_key(state.rng, Stream.ORDER, 0)
    order = np.asarray(jax.random.permutation(key, len(arrays.labels)))
    size = run.config.batch_size
    sums = {}
    for step in range(batches):
        rows = order[step * size : (step + 1) * size]
        x = np.asarray(program.gather(arrays, rows)["image"], np.float64)
        x = x.reshape(size, -1)
        for layer in range(2):
            x = x @ params[f"dense_{layer}"]["kernel"]
            mean, var = x.mean(0), x.var(0)
            sums.setdefault(f"bn_{layer}", []).append((mean, var * size / (size - 1)))
            x = (x - mean) / np.sqrt(var + run.config.bn.epsilon)
            bn = params[f"bn_{layer}"]
            x = 1 / (1 + np.exp(-(bn["scale"] * x + bn["bias"])))
    return {
        name: dict(zip(("mean", "var"), np.mean(each, 0), strict=True))
        for name, each in sums.items()
    }


def test_the_average_is_evaluated_with_its_own_statistics(small_config):
    config = dataclasses.replace(small_config, ema=DECAY, batch_stats_from=5)
    source = open_source("digits")
    run = Run(config, source)
    run.dispatch(20)
    state = average_params(config, run.state)
    assert tree_sha256(state.params) != tree_sha256(run.state.params)
    batch_stats = oracle_statistics(run, state.params, 5)
    expected = jax.tree.map(jnp.float32, batch_stats)
    moving = run.state.batch_stats
    assert not np.allclose(moving["bn_1"]["var"], expected["bn_1"]["var"], rtol=1e-2)
    evaluator = Evaluator(run.program, source.load("test", print), 100)
    by_hand = evaluator(dataclasses.replace(state, batch_stats=expected))
    found = run.evaluate()
    assert found.correct == by_hand.correct
    assert found.loss == pytest.approx(by_hand.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "spmd"])
def test_on_several_devices_it_is_the_same(small_config, parallel):
    def evaluated(**layout):
        changes = {"ema": DECAY, "batch_stats_from": 3, **layout}
        run = Run(dataclasses.replace(small_config, **changes), open_source("digits"))
        run.dispatch(10)
        return run.evaluate()

    several = evaluated(parallel=parallel, devices=5)
    assert several.loss == pytest.approx(evaluated().loss, rel=1e-5)


def test_a_resumed_run_has_the_same_average(run_small, small_config, tmp_path):
    changes = {"ema": DECAY, "batch_stats_from": 3}
    workdir, whole = run_small(**changes)
    shutil.rmtree(workdir / "checkpoints" / "60")
    config = dataclasses.replace(small_config, workdir=workdir, resume=True, **changes)
    resumed = train("digits", config)
    assert resumed["state_sha256"] == whole["state_sha256"]
    assert resumed["test_loss"] == whole["test_loss"]


@pytest.mark.parametrize("path", ["resident", "streaming"])
def test_eval_scores_it_the_same(run_small, small_config, path):
    data = dataclasses.replace(small_config.data, path=path)
    changes = {"ema": DECAY, "batch_stats_from": 4, "data": data}
    workdir, summary = run_small(**changes)
    found = evaluate_runs([workdir])
    assert found["test_loss"] == summary["test_loss"]
    assert found["test_accuracy"] == summary["test_accuracy"]


def test_both_kinds_of_statistics_are_reported(run_small, capsys):
    workdir, summary = run_small(ema=DECAY, batch_stats_from=4)
    capsys.readouterr()
    found = evaluate_runs([workdir], batch_stats_from=4)
    assert found["test_loss"] == found["population"]["test_loss"]
    assert found["test_loss"] == summary["test_loss"]
    assert found["moving_averages"]["test_loss"] > found["population"]["test_loss"]
    assert found["batch_stats_from"] == 4
    assert json.loads((workdir / "eval.json").read_text()) == found
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "moving averages:"
    assert printed[2] == "population:"


def test_a_run_without_an_average_keeps_its_score(run_small):
    workdir, summary = run_small()
    found = evaluate_runs([workdir], batch_stats_from=28)
    assert found["test_loss"] == summary["test_loss"]
    assert found["moving_averages"]["test_loss"] == summary["test_loss"]
    assert found["population"]["test_loss"] != summary["test_loss"]


def test_an_ensemble_of_both(run_small):
    workdirs = [run_small(seed=seed)[0] for seed in (1, 2)]
    found = evaluate_runs(workdirs, batch_stats_from=3)
    alone = evaluate_runs(workdirs[:1], batch_stats_from=3)
    member = found["population"]["members"][0]
    assert member["test_correct"] == alone["population"]["test_correct"]


def test_without_normalization_there_are_no_statistics(run_small):
    workdir, summary = run_small(ema=DECAY, batch_norm=False)
    found = evaluate_runs([workdir], batch_stats_from=3)
    assert found["population"]["test_loss"] == summary["test_loss"]
    assert found["moving_averages"]["test_loss"] == summary["test_loss"]
