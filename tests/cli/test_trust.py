"""Runs are data: what a run names as its network is not imported without --trust."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as eval_program
import train as train_program
from bnjax.cli import main
from bnjax.training.checkpoint import DIGESTS, METADATA_FILE
from bnjax.training.workdir import CONFIG

ROOT = Path(__file__).parents[2]
EVIL = """
from pathlib import Path
from bnjax import models

Path({marker!r}).touch()


def make(classes, normalization, dtype):
    return models.MLP((12, 9), classes, normalization=normalization, dtype=dtype)
"""
COMMANDS = {
    "eval": [],
    "predict": ["zero.png"],
    "export": ["out.stablehlo"],
    "fold": ["out.npz"],
    "inspect": [],
    "doctor": [],
    "recompute-stats": ["--output", "new"],
}


@pytest.fixture
def strangers(trained, tmp_path, monkeypatch):
    """A run with a module beside its config.json, which is the current folder."""
    run, marker = tmp_path / "run", tmp_path / "it ran"
    shutil.copytree(trained("digits"), run)
    for file in (run / CONFIG, *run.glob(f"checkpoints/*/{METADATA_FILE}")):
        record = json.loads(file.read_text())
        record["config"]["model"] |= {"name": "evil:make", "hidden": None}
        file.write_text(json.dumps(record))
    for file in run.glob(f"checkpoints/*/{DIGESTS}"):
        changed = (file.parent / METADATA_FILE).read_bytes()
        digest = {METADATA_FILE: hashlib.sha256(changed).hexdigest()}
        file.write_text(json.dumps(json.loads(file.read_text()) | digest))
    (run / "evil.py").write_text(EVIL.format(marker=str(marker)))
    (run / "zero.png").touch()
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return run, marker


@pytest.mark.parametrize("name", COMMANDS)
def test_its_code_is_not_run(name, strangers, capsys):
    run, marker = strangers
    before = sorted(run.iterdir())
    assert main([name, str(run), *COMMANDS[name]]) == 1
    assert f"{run} is code outside bnjax, evil:make, which was not run" in (
        capsys.readouterr().err
    )
    assert not marker.exists()
    assert sorted(run.iterdir()) == before


def test_a_report_says_what_it_did_not_run(strangers, tmp_path):
    run, marker = strangers
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    assert "evil:make, which was not run. If you trust its" in output.read_text()
    assert not marker.exists()


def test_eval_py_and_training_do_not_run_it(strangers, tmp_path):
    run, marker = strangers
    assert eval_program.main([str(run)]) == 1
    flags = ["--steps", "1", "--parallel", "single", "--model.hidden", "12", "9"]
    new = ["--init-from", str(run), "--workdir", str(tmp_path / "new")]
    assert train_program.main([*flags, *new]) == 0
    assert train_program.main([*flags, "--workdir", str(run), "--resume"]) == 2
    assert not marker.exists()


@pytest.mark.parametrize("program", ["-m bnjax eval", f"{ROOT / 'eval.py'}"])
def test_trusted_it_is_not_looked_for_beside_the_run(program, strangers):
    _, marker = strangers
    # bnjax is installed, as it is for most.
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *program.split(), ".", "--trust"],
        env={**os.environ, **path, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: --model evil:make: there is no module 'evil'" in done.stderr
    assert not marker.exists()


def test_trusted_and_installed_it_runs(strangers, trained, monkeypatch, tmp_path):
    run, marker = strangers
    monkeypatch.syspath_prepend(run)
    found, expected = (tmp_path / name for name in ("found.json", "expected.json"))
    assert main(["eval", str(run), "--trust", "--output", str(found)]) == 0
    assert marker.exists()
    assert main(["eval", str(trained("digits")), "--output", str(expected)]) == 0
    assert json.loads(found.read_text()) == json.loads(expected.read_text())


@pytest.mark.parametrize("change", ["hidden", "images"])
def test_what_no_memory_holds_is_not_made(trained, tmp_path, capsys, change):
    run = tmp_path / "run"
    shutil.copytree(trained("digits"), run)
    record = json.loads((run / CONFIG).read_text())
    if change == "hidden":
        record["config"]["model"]["hidden"] = [2**21, 2**21]
        expected = f"its variables take {4 * 2**42:,} bytes".partition(",")[0]
    else:
        record["data"]["image_shape"] = [2**24, 2**24, 1]
        expected = "a batch of images take"
    (run / CONFIG).write_text(json.dumps(record))
    assert main(["export", str(run), str(tmp_path / "out.stablehlo")]) == 1
    assert expected in capsys.readouterr().err
