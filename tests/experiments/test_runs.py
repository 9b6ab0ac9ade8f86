import dataclasses
import functools
import json

import pytest

from benchmarks.report import write_result
from bnjax.training.presets import PRESETS
from bnjax.training.step import state_sha256
from experiments import runs
from experiments.runs import once, run_once, visit


@pytest.fixture
def config():
    return dataclasses.replace(
        PRESETS["digits"].config,
        steps=20,
        log_every=10,
        eval_every=10,
        checkpoint_every=10,
        parallel="single",
    )


def test_each_configuration_is_measured_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    measured = []

    def measure(config):
        measured.append(config.seed)
        return {"curve": [0.1, 0.2], "of": config.seed}

    other = dataclasses.replace(config, seed=7)
    first = [once("trial", each, measure) for each in (config, other)]
    again = [once("trial", each, measure) for each in (other, config)]
    assert measured == [0, 7]
    assert again == first[::-1]
    assert again[0] | {"curve": [0.1, 0.2], "of": 7, "seed": 7} == again[0]
    once("another trial", config, measure)
    assert measured == [0, 7, 0]


@pytest.mark.slow
def test_a_run_is_that_of_train_watched_or_taken_up_again(config, tmp_path):
    kept = dataclasses.replace(config, workdir=tmp_path / "run")
    found = run_once("digits", kept)
    steps = [int(run.state.step) for run in visit(config, [0, 10])]
    assert steps == [0, 10]
    (run,) = visit(config, [20])
    assert found["state_sha256"] == state_sha256(run.state)
    assert found["steps"] == found["train_steps"] == [10, 20]
    assert len(found["train_loss"]) == len(found["test_loss"]) == 2
    last = pytest.approx(found["final_test_accuracy"], rel=1e-5)
    assert found["test_accuracy"][-1] == last
    assert found["diverged"] is None
    # As if it had been stopped before its last checkpoint.
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "20").rename(tmp_path / "lost")
    again = run_once("digits", kept)
    assert found.pop("steps_per_second") > 0 < again.pop("steps_per_second")
    assert again == found


def test_a_run_that_diverges_says_so(config):
    config = dataclasses.replace(config, learning_rate=1e38)
    found = run_once("digits", config)
    assert found["diverged"].startswith("the loss became")
    assert found["final_test_accuracy"] is None


def test_another_error_is_not_taken_for_divergence(config, tmp_path):
    config = dataclasses.replace(config, batch_size=100_000)
    with pytest.raises(Exception, match="--batch-size 100000"):
        run_once("digits", config)


def test_a_result_file_reads_back(tmp_path):
    result = {"curve": [1, 2.5, None], "names": ["[\n 1 ]"], "runs": [{"q": [1e-5]}]}
    write = functools.partial(write_result, tmp_path / "r.json", "python -m x", [0, 1])
    write(result)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text)["result"] == result
    assert '"curve": [1, 2.5, null]' in text
