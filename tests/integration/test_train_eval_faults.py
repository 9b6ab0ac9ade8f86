"""A person's mistakes: one message on stderr, an exit status, no traceback."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval as eval_program
import train as train_program
from bnjax.training.checkpoint import DIGESTS

ROOT = Path(__file__).parents[2]
SMALL = [
    "--parallel",
    "single",
    "--steps",
    "20",
    "--eval-every",
    "10",
    "--log-every",
    "10",
    "--model.hidden",
    "8",
]


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "good"
    assert train_program.main([*SMALL, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def run(good_run, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good_run, tmp_path / "run")


@pytest.fixture
def fails(capsys):
    """Call a program that must fail; return its message."""

    def call(program, *argv, status=1):
        capsys.readouterr()
        assert program.main([str(word) for word in argv]) == status
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "Traceback" not in message
        return message

    return call


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["mnits"], "Did you mean 'mnist'?"),
        (["--steps", "0"], "--steps 0: expected a whole number of 1 or more."),
        (["--learning-rate", "-1"], "--learning-rate -1.0: expected a positive number"),
        (["--bn.momentum", "2"], "expected a number in [0, 1]"),
        (["--batch-size", "2000"], "digits has 1442 training examples"),
    ],
)
def test_a_wrong_command_line(fails, argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(train_program, *argv, status=2)
    assert list(tmp_path.iterdir()) == []


def test_mnist_not_prepared(fails, tmp_path):
    started = time.monotonic()
    workdir = tmp_path / "run"
    message = fails(
        train_program, "mnist", "--data-dir", tmp_path, "--workdir", workdir
    )
    assert time.monotonic() - started < 10
    assert "is not prepared" in message
    assert "'.[prepare]'" in message
    assert not workdir.exists()


def test_a_run_in_the_way(fails, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    message = fails(train_program, *SMALL, "--workdir", run)
    assert "holds a run already" in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_loss_that_is_not_finite(fails, tmp_path):
    message = fails(
        train_program, *SMALL, "--learning-rate", 1e30, "--workdir", tmp_path / "run"
    )
    assert "the loss became nan in step 2." in message


def test_eval_of_what_is_no_run(fails, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert f"{folder} is not a run" in fails(eval_program, folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "summary.json", f"20/{DIGESTS}"])
@pytest.mark.parametrize("damage", ["empty", "half", "not text"])
def test_eval_of_a_damaged_record(fails, run, name, damage):
    (path,) = run.rglob(name)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "not text": b"\xff\xfe"}[
            damage
        ]
    )
    message = fails(eval_program, run)
    place = f"{path.parent} is damaged: {DIGESTS}" if path.name == DIGESTS else path
    assert f"{place}" in message
    assert "is damaged" in message
    assert not (run / "eval.json").exists()


def test_eval_of_an_edited_configuration(fails, run):
    path = run / "config.json"
    text = path.read_text()
    assert '"epsilon": 1e-05' in text
    path.write_text(text.replace('"epsilon": 1e-05', '"epsilon": 1e-03'))
    assert "edited or damaged" in fails(eval_program, run)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_eval_of_a_damaged_checkpoint(fails, run, damage):
    files = [p for p in (run / "checkpoints" / "20").rglob("d/*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert "is damaged" in fails(eval_program, run)
    assert not (run / "eval.json").exists()


def test_eval_of_a_run_without_a_checkpoint(fails, run):
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoints" in fails(eval_program, run)


def test_a_typo_on_the_command_line_of_a_new_process(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--stpes", "5"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "--steps" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "compiler", ["nope", pytest.param("false", marks=pytest.mark.slow)]
)
def test_kernels_that_cannot_be_had(compiler, tmp_path):
    kernels = {"BNJAX_KERNELS": "on", "CC": compiler, "BNJAX_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, "--workdir", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | kernels,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    # jaxlib may log that it found no GPU.
    (line,) = re.findall(r"^(?!WARNING: All log|I\d{4} ).+$", done.stderr, re.MULTILINE)
    assert line.startswith("error: BNJAX_KERNELS=on: ")
    assert compiler in line
