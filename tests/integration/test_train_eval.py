"""The two programs, as a newcomer runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval as eval_program
import train as train_program
from bnjax.data.sources import find_data_dir
from bnjax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    assert train_program.main(["--parallel", "single", "--workdir", str(workdir)]) == 0
    return workdir


def read(path):
    return json.loads(path.read_text())


def test_digits_reaches_its_accuracy(digits_run):
    summary = read(digits_run / "summary.json")
    assert summary["steps"] == 2000
    assert summary["test_accuracy"] >= 0.97
    assert summary["train_seconds"] < 30


def test_eval_agrees_to_the_last_digit(digits_run, capsys):
    assert eval_program.main([str(digits_run)]) == 0
    summary, result = (read(digits_run / f"{n}.json") for n in ("summary", "eval"))
    for name in ("test_accuracy", "test_loss", "test_correct", "test_examples"):
        assert result[name] == summary[name]
    assert repr(summary["test_accuracy"]) in capsys.readouterr().out


@pytest.mark.slow
def test_eval_agrees_in_a_program_of_its_own(digits_run):
    # Another process, another number of devices, another folder.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), digits_run.name],
        cwd=digits_run.parent,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = read(digits_run / "summary.json")
    assert repr(summary["test_accuracy"]) in done.stdout
    assert read(digits_run / "eval.json")["test_accuracy"] == summary["test_accuracy"]


@pytest.mark.slow
def test_without_batch_norm(tmp_path):
    argv = ["--no-batch-norm", "--steps", "40", "--workdir", str(tmp_path / "run")]
    assert train_program.main(argv) == 0
    assert eval_program.main([str(tmp_path / "run")]) == 0
    summary, result = (
        read(tmp_path / "run" / f"{name}.json") for name in ("summary", "eval")
    )
    assert result["test_accuracy"] == summary["test_accuracy"]
    assert summary["steps"] == 40


@pytest.mark.slow
def test_mnist_learns_faster_with_batch_norm(tmp_path):
    if not (find_data_dir() / "mnist").is_dir():
        pytest.skip(
            f"MNIST is not prepared in {find_data_dir()}: set TFDS_DATA_DIR to where "
            "it is, or prepare it with the command `python train.py mnist` prints"
        )
    for flag in ("--batch-norm", "--no-batch-norm"):
        argv = ["mnist", "--steps", "2000", "--workdir", str(tmp_path / flag), flag]
        assert train_program.main(argv) == 0
    curves = {
        flag: [
            r["accuracy"] for r in read_metrics(tmp_path / flag) if "test" in r["split"]
        ]
        for flag in ("--batch-norm", "--no-batch-norm")
    }
    assert len(curves["--batch-norm"]) == 4
    pairs = zip(curves["--batch-norm"], curves["--no-batch-norm"], strict=True)
    assert all(with_bn > without for with_bn, without in pairs)
    assert curves["--batch-norm"][-1] > 0.9
