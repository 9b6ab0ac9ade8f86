"""The program itself: its help, its words, its exit statuses, what it costs."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax
from bnjax.cli import COMMANDS, main, run_reporting
from bnjax.data.config import DataError, SettingError
from bnjax.training.faults import Stopped

ROOT = Path(__file__).parents[2]


def test_help_lists_the_commands(run):
    lines = [line.split() for line in run("--help").splitlines()]
    for name, command in COMMANDS.items():
        assert [name, *command.__doc__.splitlines()[0].split()] in lines
    assert run("--version") == f"{bnjax.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: bnjax {name} " in printed
    if name != "train":
        assert COMMANDS[name].__doc__.splitlines()[0] in printed


def test_wrong_words(fails, capsys):
    assert "Did you mean 'predict'?" in fails("predcit", "runs/a", status=2)
    assert "no command is given. Expected one of" in fails(status=2)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "runs/a", "--jsn"])
    assert stopped.value.code == 2
    assert "--json" in capsys.readouterr().err


def test_help_opens_nothing_heavy():
    code = (
        "import sys\n"
        "from bnjax.cli import main\n"
        "main(['--help'])\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert loaded.isdisjoint({"flax", "optax", "orbax", "grain", "cv2"})
    assert after.ru_utime - before.ru_utime < 3


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("what to do"), 1, "error: what to do"),
        (SettingError("what to do"), 2, "error: what to do"),
        (Stopped("saved", 15), 143, "saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError("no", name="optax"),
            1,
            (
                "error: the package optax is not installed, and training needs it: pip "
                "install '.[train]' in a clone of bnjax."
            ),
        ),
    ],
    ids=["one", "usage", "signal", "interrupted", "package"],
)
def test_what_a_person_can_put_right_is_one_line(error, status, line, capsys):
    def fail():
        raise error

    assert run_reporting(fail) == status
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
    def fail():
        raise error

    with pytest.raises(type(error)):
        run_reporting(fail)


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


def test_without_tyro_it_says_what_to_install(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(name='tyro')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "bnjax", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the package tyro is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_name_of_a_model_is_no_preset(capsys):
    assert main(["train", "resnet18"]) == 2
    message = capsys.readouterr().err
    assert "preset 'resnet18' is unknown. It is a model: write" in message
    assert "`PRESET --model resnet18`" in message
