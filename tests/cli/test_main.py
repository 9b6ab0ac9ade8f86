"""python -m bnjax itself: its help, its words, what it costs."""

import resource
import subprocess
import sys

import pytest
from bnjax.commands import COMMANDS, command_line

import bnjax
from bnjax.cli import main


def test_help_lists_the_commands(run):
    printed = run("--help")
    for name, summary in COMMANDS.items():
        assert f"  {name} " in printed
        assert summary in printed
    assert run("--version") == f"{bnjax.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m bnjax {name} " in printed


def test_every_command_has_arguments():
    assert list(command_line._ARGUMENTS) == list(COMMANDS)


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
    assert loaded.isdisjoint({"flax", "optax", "orbax", "grain", "tyro", "cv2"})
    assert after.ru_utime - before.ru_utime < 3
