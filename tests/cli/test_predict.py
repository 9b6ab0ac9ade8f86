"""Images classified: as the run's own evaluation does it."""

import json

import cv2
import numpy as np
import pytest

from bnjax.cli import main
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import open_source
from bnjax.training.evaluation import load_run
from bnjax.training.runs import list_images
from tests.cli.conftest import evaluated
from tests.data import image_folder, prepared_set


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Write digits as files, and return the folder and the pixels."""
    folder = tmp_path_factory.mktemp("digits")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    for number, image in enumerate(pixels):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder, pixels


def test_agrees_with_the_evaluation(trained, images, run, tmp_path):
    workdir = trained("images")
    found = run("predict", workdir, images / "val", "--json", "--top", 3)
    assert (found["workdir"], found["step"], found["unreadable"]) == (
        str(workdir),
        60,
        [],
    )
    expected = evaluated(workdir, tmp_path)
    files = [each["file"] for each in found["images"]]
    assert files == sorted(str(path) for path in images.glob("val/*/*.jpg"))
    correct, loss = 0, []
    for each in found["images"]:
        by_class = {p["class"]: p["probability"] for p in each["predictions"]}
        assert set(by_class) == set(image_folder.CLASSES)
        assert sum(by_class.values()) == pytest.approx(1, abs=1e-12)
        named = each["file"].split("/")[-2]
        correct += each["predictions"][0]["class"] == named
        loss.append(-np.log(by_class[named]))
    assert correct == expected["test_correct"]
    assert np.mean(loss) == pytest.approx(expected["test_loss"], rel=1e-5)


def test_probabilities_of_files(trained, digits, run):
    folder, pixels = digits
    found = run("predict", trained("digits"), folder, "--json", "--top", 99)
    opened = load_run(trained("digits"))
    program, state = opened.restore()
    x = make_to_inputs(opened.config.data, 255)(pixels)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.float64(program.model.apply(variables, x, train=False))
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert len(found["images"]) == 5
    for each, row in zip(found["images"], expected, strict=True):
        assert [p["label"] for p in each["predictions"]] == np.argsort(-row).tolist()
        for p in each["predictions"]:
            assert p["probability"] == pytest.approx(row[p["label"]], rel=1e-5)
            assert p["class"] == str(p["label"])


def test_table_and_file(trained, digits, run, tmp_path):
    folder, _ = digits
    output = tmp_path / "out.json"
    argv = ["predict", trained("digits"), folder / "1.png", folder / "0.png"]
    lines = run(*argv, "--top", 2, "--output", output).splitlines()
    written = json.loads(output.read_text())
    assert lines[0].split() == ["image", "1", "2"]
    for line, each in zip(lines[1:], written["images"], strict=True):
        first, second = each["predictions"]
        shown = [[p["class"], f"{p['probability']:.2%}"] for p in (first, second)]
        assert line.split() == [each["file"], *shown[0], *shown[1]]
    assert [each["file"][-5:] for each in written["images"]] == ["1.png", "0.png"]


def test_many_batches(trained, digits, run, monkeypatch):
    folder, _ = digits
    expected = run("predict", trained("digits"), folder, "--json")
    monkeypatch.setattr("bnjax.training.runs.BATCH", 2)
    found = run("predict", trained("digits"), folder, "--json")
    for one, other in zip(found["images"], expected["images"], strict=True):
        assert one["file"] == other["file"]
        for p, q in zip(one["predictions"], other["predictions"], strict=True):
            assert p["label"] == q["label"]
            assert p["probability"] == pytest.approx(q["probability"], rel=1e-5)


def test_damaged_images(trained, digits, run, fails, tmp_path, capsys):
    folder, _ = digits
    bad = tmp_path / "bad.png"
    bad.write_bytes((folder / "0.png").read_bytes()[:-20])
    found = run("predict", trained("digits"), bad, folder / "0.png", "--json")
    assert [each["file"] for each in found["images"]] == [str(folder / "0.png")]
    assert found["unreadable"] == [str(bad)]
    assert main(["predict", str(trained("digits")), str(bad)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"note: {bad} is truncated, left out"
    assert err[1].startswith("error: none of 1 files can be decoded")


def test_faults(trained, digits, images, fails, tmp_path):
    folder, _ = digits
    argv = ["predict", trained("digits")]
    assert "expected 1 or more" in fails(*argv, folder, "--top", 0, status=2)
    assert "no image is given" in fails(*argv, status=2)
    assert "is not there" in fails(*argv, tmp_path / "no", status=2)
    assert f"{tmp_path} holds no image" in fails(*argv, tmp_path, status=2)
    taken = tmp_path / "taken.json"
    taken.write_text("old")
    assert "exists already" in fails(*argv, folder, "--output", taken, status=2)
    assert taken.read_text() == "old"
    message = fails(*argv, images / "val")
    assert "has 20x30 pixels (height x width), but the network takes 8x8" in message
    assert "is not a run" in fails("predict", tmp_path, folder)


def test_names_of_classes(images, tmp_path):
    assert open_source("digits").class_names is None
    prepared = prepared_set.write(tmp_path)
    assert open_source(str(prepared)).class_names == ("0", "1", "2")
    (prepared / "label.labels.txt").write_text("ant\nbee\ncat\n")
    assert open_source(str(prepared)).class_names == ("ant", "bee", "cat")
    source = open_source(str(images), image_size=16)
    assert source.class_names == image_folder.CLASSES
    # Folders are searched at every depth, in order.
    found = list_images([images / "val"])
    assert [path.name for path in found[:4]] == ["00.jpg", "01.jpg", "02.jpg", "00.jpg"]
