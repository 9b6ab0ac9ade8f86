import json

import pytest

import eval as eval_program
import train as train_program
from bnjax.cli import main
from tests.data import image_folder

FLAGS = ["--parallel", "single", "--steps", "60", "--batch-size", "30"]
FLAGS += ["--model.hidden", "12", "9"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Give a folder of images, train and val."""
    return image_folder.write(tmp_path_factory.mktemp("data") / "images", count=20)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, images):
    """Give runs by name, each trained once."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        "digits": [],
        "images": ["--data.name", str(images), "--data.image-size", "16"],
    }

    def call(name):
        workdir = folder / name
        if not workdir.exists():
            argv = [*FLAGS, *flags[name], "--workdir", str(workdir)]
            assert train_program.main(argv) == 0
        return workdir

    return call


def evaluated(workdir, tmp_path):
    output = tmp_path / "eval.json"
    assert eval_program.main([str(workdir), "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.fixture
def run(capsys):
    """Run a command; return what it printed, as JSON where that was asked for."""

    def call(*argv):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in argv else printed

    return call


@pytest.fixture
def fails(capsys):
    """Run a command that a user has to put right; return the message."""

    def call(*argv, status=1):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == status
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith("error: ")
        return streams.err

    return call
