"""eval.py with crops and with several runs, and what people get wrong with them."""

import json
import shutil

import numpy as np
import pytest

import eval as eval_program
import train as train_program
from bnjax.training import evaluation
from tests.data import image_folder

FLAGS = [
    "--parallel",
    "single",
    "--steps",
    "60",
    "--batch-size",
    "50",
    "--model.hidden",
    "12",
]
OBLONG = "synthetic:8x6:10:100"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(folder):
    def call(name, *flags):
        workdir = folder / name
        if not workdir.exists():
            argv = [*FLAGS, "--workdir", str(workdir), *map(str, flags)]
            assert train_program.main(argv) == 0
        return workdir

    return call


@pytest.fixture
def evaluate(capsys, tmp_path):
    """Call eval.py; return what it wrote and what it printed."""

    def call(*argv):
        capsys.readouterr()
        output = tmp_path / "output.json"
        words = [str(word) for word in argv]
        assert eval_program.main([*words, "--output", str(output)]) == 0
        return json.loads(output.read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def fails(capsys):
    def call(*argv, status=1):
        capsys.readouterr()
        assert eval_program.main([str(word) for word in argv]) == status
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return call


def test_an_ensemble_and_its_members(train, evaluate):
    # One of them is given its pixels otherwise.
    runs = [
        train("one"),
        train("two", "--seed", 1, "--data.mean", 0.5, "--data.std", 0.25),
    ]
    alone = [evaluate(run)[0] for run in runs]
    result, printed = evaluate(*runs)

    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{runs[0]}, step 60",
        f"{runs[1]}, step 60",
        "ensemble of 2",
    ]
    assert repr(result["test_accuracy"]) in lines[-1]
    for run, member, single in zip(runs, result["members"], alone, strict=True):
        assert (member["workdir"], member["step"]) == (str(run), 60)
        for name in ("accuracy", "correct", "examples", "top5_correct"):
            assert member[f"test_{name}"] == single[f"test_{name}"]
        assert member["test_loss"] == pytest.approx(single["test_loss"], rel=1e-5)
        assert not (run / "eval.json").exists()
    # The loss of the mean is below the mean of the losses.
    assert result["test_loss"] < sum(single["test_loss"] for single in alone) / 2
    assert result["test_examples"] == 355


def test_crops_of_an_image_folder(train, evaluate, tmp_path):
    images = image_folder.write(tmp_path / "images", count=20)
    run = train("folder", "--data.name", images, "--data.image-size", 16)
    result, printed = evaluate(run, "--crops", 144)
    assert (result["crops"], result["test_examples"], result["step"]) == (144, 9, 60)
    assert printed.startswith("step 60, 144 crops: test accuracy ")
    assert "test_top5_accuracy" not in result
    assert eval_program.main([str(run), "--crops", "10"]) == 0
    written = json.loads((run / "eval.json").read_text())
    assert (written["crops"], written["test_examples"]) == (10, 9)


def test_runs_that_make_no_ensemble(train, fails):
    one, other = train("one"), train("other", "--data.name", OBLONG)
    message = fails(one, other)
    assert "these runs make no ensemble" in message
    assert f"{one} on digits (digits, images of 8x8, 10 classes)" in message
    assert f"{other} on {OBLONG}" in message
    assert f"{one} is named twice" in fails(one, one, status=2)


def test_other_faults(train, fails, tmp_path):
    one = train("one")
    missing = tmp_path / "no" / "folder.json"
    assert "is in a folder not there" in fails(one, "--output", missing, status=2)
    assert "is a folder" in fails(one, "--output", tmp_path, status=2)
    assert "expected 1, 10 or 144" in fails(one, "--crops", 12, status=2)
    assert f"{tmp_path} is no run" in fails(one, tmp_path)
    bare = shutil.copytree(one, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    assert "has no checkpoints" in fails(one, bare)
    other = train("other", "--data.name", OBLONG)
    message = fails(other, "--crops", 10, status=2)
    assert "the network takes images of 8x6" in message
    assert not (one / "eval.json").exists()


def test_a_network_without_a_finite_loss(train, fails, monkeypatch):
    nan = {"loss": np.full(355, np.nan), "correct": np.zeros(355, bool)}
    found = evaluation.Evaluation.of([nan])
    monkeypatch.setattr(evaluation.Evaluation, "of", lambda parts: found)
    run = train("one")
    message = fails(run)
    assert f"the network of {run} has a test loss of nan" in message
    assert not (run / "eval.json").exists()
