import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from bnjax.data.sources import open_source
from bnjax.training import loop
from bnjax.training.build import build
from bnjax.training.errors import UserError
from bnjax.training.evaluation import evaluate_run
from bnjax.training.loop import Run, train
from bnjax.training.metrics import read_metrics
from bnjax.training.optimizer import make_schedule
from bnjax.training.state import Stream, stream_key
from bnjax.training.step import make_train_step


@pytest.fixture
def run_small(small_config, tmp_path):
    """Train the small run with some fields changed; return its folder and summary."""
    count = 0

    def run(**changes):
        nonlocal count
        count += 1
        workdir = tmp_path / f"run{count}"
        config = dataclasses.replace(small_config, workdir=workdir, **changes)
        return workdir, train("digits", config)

    return run


def test_a_run_is_a_function_of_its_configuration(run_small):
    digests = {
        name: run_small(**changes)[1]["state_sha256"]
        for name, changes in {
            "first": {},
            "again": {},
            "seed": {"seed": 1},
            "dispatch": {"log_every": 15},
        }.items()
    }
    assert digests["first"] == digests["again"] == digests["dispatch"]
    assert len(set(digests.values())) == 2


def test_it_equals_one_step_after_the_other(small_config):
    config = dataclasses.replace(small_config, steps=32, batch_size=300)
    source = open_source("digits")
    program = build(config, source)
    run = Run(config, source)
    losses = np.concatenate([run.dispatch(n)[1] for n in (5, 20, 7)])

    state, arrays = program.initial_state(), source.load("train", print)
    step = jax.jit(make_train_step(program.model, program.optimizer))
    expected = []
    for epoch in range(8):
        key = stream_key(state.rng, Stream.ORDER, epoch)
        order = np.asarray(jax.random.permutation(key, 1442))
        for rows in order[:1200].reshape(4, 300):
            state, metrics = step(state, program.gather(arrays, rows))
            expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (run.state.params, run.state.batch_stats),
        (state.params, state.batch_stats),
    )
    assert int(run.state.step) == run.step == 32


def test_what_a_run_leaves(run_small, small_config):
    workdir, summary = run_small()
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "checkpoints"}
    written = json.loads((workdir / "summary.json").read_text())
    assert written == {"preset": "digits", **summary}
    assert written["steps"] == 60
    assert written["parameters"] == 64 * 12 + 12 * 9 + 2 * (12 + 9) + 9 * 10 + 10
    assert len(written["state_sha256"]) == 64
    assert written["test_examples"] == 355
    assert written["test_accuracy"] == written["test_correct"] / 355
    assert written["steps_per_second"] == pytest.approx(60 / written["train_seconds"])

    records = read_metrics(workdir)
    trained = [r for r in records if r["split"] == "train"]
    tested = [r for r in records if r["split"] == "test"]
    assert [r["step"] for r in trained] == [10, 20, 30, 40, 50, 60]
    assert [r["step"] for r in tested] == [30, 60]
    assert tested[-1]["accuracy"] == written["test_accuracy"]
    assert tested[-1]["loss"] == written["test_loss"]
    schedule = make_schedule(small_config)
    for record in trained:
        assert record["learning_rate"] == pytest.approx(
            float(schedule(record["step"] - 1)), rel=1e-6
        )
        assert record["steps_per_second"] > 0
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_evaluation_agrees_to_the_last_digit(run_small):
    workdir, summary = run_small()
    evaluated = evaluate_run(workdir)
    assert evaluated["step"] == 60
    for name in ("test_accuracy", "test_loss", "test_correct", "test_examples"):
        assert evaluated[name] == summary[name]


def test_without_batch_normalization(run_small):
    workdir, summary = run_small(batch_norm=False)
    assert summary["parameters"] == 64 * 12 + 12 + 12 * 9 + 9 + 9 * 10 + 10
    assert evaluate_run(workdir)["test_loss"] == summary["test_loss"]


def test_flaxs_layer_trains_to_the_same_place(run_small, small_config):
    biased = dataclasses.replace(small_config.bn, unbiased=False)
    theirs = dataclasses.replace(biased, implementation="flax")
    _, ours = run_small(bn=biased)
    _, flaxs = run_small(bn=theirs)
    assert ours["test_loss"] == pytest.approx(flaxs["test_loss"], rel=1e-3)
    assert ours["parameters"] == flaxs["parameters"]


def test_a_loss_that_is_not_finite(run_small, tmp_path, small_config):
    with pytest.raises(UserError) as caught:
        run_small(learning_rate=1e30)
    message = str(caught.value)
    assert "the loss became nan in step 2." in message
    assert "No checkpoint had been written yet" in message
    assert "Try a --learning-rate below 1e+30" in message
    assert not (tmp_path / "run1" / "summary.json").exists()
    assert read_metrics(tmp_path / "run1") == []


def test_the_last_good_checkpoint_is_named(run_small, tmp_path, monkeypatch):
    dispatch = Run.dispatch

    def break_after_30(self, steps):
        record, losses = dispatch(self, steps)
        if self.step > 40:
            losses = losses.copy()
            losses[3] = np.inf
        return record, losses

    monkeypatch.setattr(Run, "dispatch", break_after_30)
    with pytest.raises(UserError) as caught:
        run_small()
    assert "became inf in step 44." in str(caught.value)
    good = tmp_path / "run1" / "checkpoints" / "30"
    assert f"The last good checkpoint is {good}." in str(caught.value)
    assert evaluate_run(tmp_path / "run1")["step"] == 30


def test_ctrl_c_names_the_step_and_the_checkpoint(run_small, tmp_path, monkeypatch):
    dispatch = Run.dispatch

    def interrupt(self, steps):
        if self.step == 50:
            raise KeyboardInterrupt
        return dispatch(self, steps)

    monkeypatch.setattr(Run, "dispatch", interrupt)
    with pytest.raises(UserError, match=r"interrupted in step 50\..*/30\.") as caught:
        run_small()
    assert caught.value.status == 130


def test_a_workdir_that_holds_a_run_is_refused(run_small, small_config):
    workdir, _ = run_small()

    def digest():
        return {
            path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in workdir.rglob("*")
            if path.is_file()
        }

    before = digest()
    with pytest.raises(UserError, match="Nothing was overwritten"):
        train("digits", dataclasses.replace(small_config, workdir=workdir))
    assert digest() == before


def test_a_batch_larger_than_the_data(small_config, tmp_path):
    config = dataclasses.replace(
        small_config, batch_size=1443, workdir=tmp_path / "run"
    )
    with pytest.raises(UserError, match="1443: digits has 1442 training") as caught:
        train("digits", config)
    assert caught.value.status == 2
    assert not (tmp_path / "run").exists()


def test_a_folder_is_claimed_only_once_the_data_are_found(small_config, tmp_path):
    data = dataclasses.replace(small_config.data, name="mnist")
    config = dataclasses.replace(
        small_config, data=data, data_dir=tmp_path, workdir=tmp_path / "run"
    )
    with pytest.raises(UserError, match="not prepared"):
        train("mnist", config)
    assert not (tmp_path / "run").exists()


def test_compiling_is_not_timed(small_config, monkeypatch):
    times = iter([0.0, 100.0, 200.0, 202.0, 300.0, 301.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(times))
    run = Run(small_config, open_source("digits"))
    assert run.dispatch(10)[0].steps_per_second == 5.0
    assert run.dispatch(10)[0].steps_per_second == 10.0
    assert (run.seconds, run.compile_seconds) == (3.0, 100.0)
