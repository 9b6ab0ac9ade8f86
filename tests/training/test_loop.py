import dataclasses
import json
import signal

import chex
import jax
import numpy as np
import pytest

from bnjax.data.config import DataConfig, SettingError
from bnjax.data.sources import open_data, open_source
from bnjax.training import loop as run_module
from bnjax.training.config import ModelConfig, OptimizerConfig, RunError
from bnjax.training.evaluation import evaluate_runs
from bnjax.training.faults import Stopped
from bnjax.training.loop import Run, train
from bnjax.training.metrics import read_metrics
from bnjax.training.optimizer import make_schedule
from bnjax.training.presets import PRESETS
from bnjax.training.program import Program
from bnjax.training.step import Stream, make_train_step, stream_key


def test_a_run_is_a_function_of_its_configuration(run_small):
    first, again, dispatch, seed = (
        run_small(**changes)[1]["state_sha256"]
        for changes in ({}, {}, {"log_every": 15}, {"seed": 1})
    )
    assert first == again == dispatch != seed


@pytest.mark.slow
def test_it_equals_one_step_after_the_other(small_config):
    config = dataclasses.replace(small_config, steps=32, batch_size=300)
    source = open_source("digits")
    program = Program(config, source)
    run = Run(config, source)
    losses = np.concatenate([run.dispatch(n)[0]["loss"] for n in (5, 20, 7)])

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
    chex.assert_trees_all_close(
        (run.state.params, run.state.batch_stats),
        (state.params, state.batch_stats),
        rtol=1e-4,
        atol=1e-5,
    )
    assert int(run.state.step) == run.step == 32


def test_what_a_run_leaves(run_small, small_config):
    workdir, summary = run_small()
    names = {path.name for path in workdir.iterdir()} - {".lock"}
    files = {"config.json", "metrics.jsonl", "layers.jsonl", "summary.json"}
    assert names == {*files, "checkpoints"}
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
    evaluated = evaluate_runs([workdir])
    assert evaluated["step"] == 60
    for name in ("test_accuracy", "test_loss", "test_correct", "test_examples"):
        assert evaluated[name] == summary[name]


def test_without_batch_normalization(run_small):
    workdir, summary = run_small(batch_norm=False)
    assert summary["parameters"] == 64 * 12 + 12 + 12 * 9 + 9 + 9 * 10 + 10
    assert evaluate_runs([workdir])["test_loss"] == summary["test_loss"]


@pytest.mark.slow
def test_flaxs_layer_trains_to_the_same_place(run_small, small_config):
    biased = dataclasses.replace(small_config.bn, unbiased=False)
    theirs = dataclasses.replace(biased, implementation="flax")
    _, ours = run_small(bn=biased)
    _, flaxs = run_small(bn=theirs)
    assert ours["test_loss"] == pytest.approx(flaxs["test_loss"], rel=1e-3)
    assert ours["parameters"] == flaxs["parameters"]


def test_a_loss_that_is_not_finite(run_small, tmp_path, small_config):
    with pytest.raises(RunError) as caught:
        run_small(learning_rate=1e30)
    message = str(caught.value)
    assert "the loss became nan in step 2." in message
    assert "There is no checkpoint yet" in message
    assert "Try a --learning-rate below 1e+30" in message
    assert not (tmp_path / "run1" / "summary.json").exists()
    assert read_metrics(tmp_path / "run1") == []


def test_the_last_good_checkpoint_is_named(run_small, tmp_path, monkeypatch):
    dispatch = Run.dispatch

    def break_after_30(self, steps):
        taken, seconds = dispatch(self, steps)
        if self.step > 40:
            taken["loss"][3] = np.inf
        return taken, seconds

    monkeypatch.setattr(Run, "dispatch", break_after_30)
    with pytest.raises(RunError) as caught:
        run_small()
    assert "became inf in step 44." in str(caught.value)
    good = tmp_path / "run1" / "checkpoints" / "30"
    assert f"The last good checkpoint is {good}." in str(caught.value)
    assert evaluate_runs([tmp_path / "run1"])["step"] == 30


@pytest.fixture
def stop_at(monkeypatch):
    """Do something as soon as a step has been reached, once."""
    dispatch = Run.dispatch

    def at(step, action):
        def stopping(self, steps):
            found = dispatch(self, steps)
            if self.step == step:
                monkeypatch.setattr(Run, "dispatch", dispatch)
                action()
            return found

        monkeypatch.setattr(Run, "dispatch", stopping)

    return at


class CrashError(Exception):
    pass


def crash():
    raise CrashError


def without_rates(workdir):
    records = read_metrics(workdir)
    for record in records:
        record.pop("steps_per_second", None)
    return records


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_finishes_the_dispatch_and_saves(
    run_small, stop_at, tmp_path, number, status
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stop_at(40, lambda: signal.raise_signal(number))
    with pytest.raises(Stopped) as caught:
        run_small()
    assert 128 + caught.value.signal == status
    saved = tmp_path / "run1" / "checkpoints" / "40"
    message = str(caught.value)
    assert message.startswith(f"stopped by {number.name} after step 40. ")
    assert f"The last good checkpoint is {saved}." in message
    assert f"--workdir {tmp_path / 'run1'} --resume" in message
    assert evaluate_runs([tmp_path / "run1"])["step"] == 40
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_in_the_last_dispatch_changes_nothing(run_small, stop_at):
    stop_at(60, lambda: signal.raise_signal(signal.SIGTERM))
    assert run_small()[1]["steps"] == 60


# Before the first checkpoint, between two, and after the last.
@pytest.mark.parametrize(
    ("step", "resumed"),
    [
        pytest.param(20, 0, marks=pytest.mark.slow),
        (50, 40),
        pytest.param(60, 40, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run_never_stopped(
    run_small, small_config, stop_at, tmp_path, step, resumed, capsys
):
    schedule = "cosine_decay_schedule"
    optim = OptimizerConfig(name="adam", schedule=schedule, warmup_steps=5)
    changes = {"optim": optim, "checkpoint_every": 20, "learning_rate": 0.01}
    whole, expected = run_small(**changes)
    stop_at(step, crash)
    with pytest.raises(CrashError):
        run_small(**changes)
    workdir = tmp_path / "run2"
    assert resumed == 0 or (workdir / "checkpoints" / str(resumed)).exists()
    config = dataclasses.replace(
        small_config, workdir=workdir, resume=True, keep=5, **changes
    )
    capsys.readouterr()
    found = train("digits", config)
    assert f"step {resumed}" in capsys.readouterr().err
    assert found["state_sha256"] == expected["state_sha256"]
    assert found["test_loss"] == expected["test_loss"]
    assert without_rates(workdir) == without_rates(whole)


def test_a_run_at_its_end_is_summed_up_again(run_small, small_config):
    workdir, expected = run_small()
    before = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "summary.json").unlink()
    config = dataclasses.replace(small_config, workdir=workdir, resume=True)
    found = train("digits", config)
    del expected["compile_seconds"], found["compile_seconds"]
    assert found == expected
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_what_is_written_on_request(run_small):
    plain, expected = run_small()
    workdir, found = run_small(tensorboard=True, histograms=True, profile=True)
    assert found["state_sha256"] == expected["state_sha256"]
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    names = {path.name for path in workdir.iterdir()}
    assert names - {path.name for path in plain.iterdir()} == {"tensorboard", "profile"}


def test_the_table_of_a_summary():
    summary = {
        "best_test_accuracy": 0.98,
        "best_step": 1500,
        "steps": 2000,
        "steps_per_second": 5000.0,
        "train_seconds": 0.4,
        "compile_seconds": 2.0,
        "parameters": 28010,
        "state_sha256": "0123456789abcdef",
    }
    assert run_module.final_table(summary).splitlines() == [
        "best        98.00 % at step 1,500",
        "steps       2,000 in 0:00:00, 5,000 steps/s, and 2.0 s to compile",
        "parameters  28,010",
        "state       0123456789ab",
    ]


def test_the_best_test_is_in_the_summary(run_small):
    workdir, summary = run_small(eval_every=10)
    tests = [r for r in read_metrics(workdir) if r["split"] == "test"]
    assert len(tests) == 6
    assert summary["best_test_accuracy"] == max(test["accuracy"] for test in tests)
    (best,) = [test for test in tests if test["step"] == summary["best_step"]]
    assert best["accuracy"] == summary["best_test_accuracy"]


def test_a_folder_without_a_run_is_started(run_small):
    assert run_small(resume=True)[1]["steps"] == 60


def test_a_run_of_another_configuration_is_not_resumed(run_small, small_config):
    workdir, _ = run_small()
    config = dataclasses.replace(
        small_config,
        workdir=workdir,
        resume=True,
        seed=7,
        bn=dataclasses.replace(small_config.bn, momentum=0.5),
    )
    with pytest.raises(SettingError) as caught:
        train("digits", config)
    assert "--seed: the run has 0, 7 was given" in str(caught.value)
    assert "--bn.momentum: the run has 0.9, 0.5 was given" in str(caught.value)
    assert "--keep" not in str(caught.value)


def test_other_versions_are_named(run_small, small_config, capsys):
    workdir, _ = run_small()
    record = json.loads((workdir / "config.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    (workdir / "config.json").write_text(json.dumps(record))
    train("digits", dataclasses.replace(small_config, workdir=workdir, resume=True))
    assert "'jax': '0.0.1'" in capsys.readouterr().err


def test_a_workdir_that_holds_a_run_is_refused(run_small, small_config):
    workdir, _ = run_small()

    def contents():
        return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}

    before = contents()
    with pytest.raises(RunError, match=r"overwritten: add --resume to continue"):
        train("digits", dataclasses.replace(small_config, workdir=workdir))
    assert contents() == before


def test_a_batch_larger_than_the_data(run_small, tmp_path):
    with pytest.raises(SettingError, match="1443: digits has 1442 training"):
        run_small(batch_size=1443)
    assert not (tmp_path / "run1").exists()


def test_a_folder_is_claimed_only_once_the_data_are_found(small_config, tmp_path):
    data = dataclasses.replace(small_config.data, name="mnist")
    config = dataclasses.replace(
        small_config, data=data, data_dir=tmp_path, workdir=tmp_path / "run"
    )
    with pytest.raises(ValueError, match="not prepared"):
        train("mnist", config)
    assert not (tmp_path / "run").exists()


def test_compiling_is_not_timed(small_config, monkeypatch):
    times = iter([0.0, 100.0, 200.0, 202.0, 300.0, 301.0])
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: next(times))
    run = Run(small_config, open_source("digits"))
    assert run.dispatch(10)[1] == 2.0
    assert run.dispatch(10)[1] == 1.0
    assert (run.seconds, run.compile_seconds) == (3.0, 100.0)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="loops are slow on a CPU")
def test_the_steps_of_a_convolutional_network_are_single_calls():
    config = dataclasses.replace(
        PRESETS["digits"].config,
        batch_size=8,
        parallel="single",
        model=ModelConfig(name="lenet"),
        data=DataConfig(name="synthetic:28x28x1:10:64"),
    )
    run = Run(config, open_data(config.data))
    run.dispatch(3)
    run.dispatch(2)
    assert list(run._compiled) == [1]
    assert int(run.state.step) == run.step == 5
    run.close()


def test_the_steps_of_a_fully_connected_one_are_scanned():
    config = PRESETS["digits"].config
    assert Program(config, open_data(config.data)).scans
