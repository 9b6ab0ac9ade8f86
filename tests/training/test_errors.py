import subprocess
import sys
from pathlib import Path

import pytest

from bnjax.cli import run_reporting
from bnjax.data.config import DataError, SettingError

ROOT = Path(__file__).parents[2]


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("what to do"), 1, "error: what to do"),
        (SettingError("what to do"), 2, "error: what to do"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError("no", name="optax"),
            1,
            (
                "error: the package optax is not installed, and training needs it: pip "
                "install -r requirements.txt, or pip install 'bnjax[train]'."
            ),
        ),
    ],
    ids=["one", "usage", "interrupted", "package"],
)
def test_what_a_person_can_put_right_is_one_line(error, status, line, capsys):
    assert run_reporting(raising(error)) == status
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        ValueError("ours"),
        ModuleNotFoundError("no", name="bnjax.missing"),
    ],
)
def test_our_own_faults_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_reporting(raising(error))


def test_success():
    assert run_reporting(lambda: None) == 0


def test_a_reader_who_leaves_early():
    with subprocess.Popen(
        [sys.executable, "train.py", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        status = process.wait(timeout=60)
    assert (status, errors) == (141, b"")
