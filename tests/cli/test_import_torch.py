"""Weights of PyTorch made into runs."""

import json

import jax
import numpy as np
import pytest

from bnjax.cli import parse_train
from bnjax.data.config import DataConfig
from bnjax.data.sources import Source
from bnjax.interop.torch import Layer, to_torch
from bnjax.interop.torch_files import format_mapping, write_state_dict
from bnjax.training.checkpoint import open_checkpoints
from bnjax.training.evaluation import load_run
from bnjax.training.program import Program
from bnjax.training.workdir import read_config
from tests.cli.conftest import FLAGS, evaluated


@pytest.fixture
def variables(trained):
    _, state = load_run(trained("digits")).restore()
    return {"params": state.params, "batch_stats": state.batch_stats}


@pytest.fixture
def importing(tmp_path):
    """The words of a command that imports a file."""
    file, new = tmp_path / "weights.safetensors", tmp_path / "new"
    return file, new, ["import-torch", file, "--preset", "digits", "--output", new]


def test_weights_from_pytorch(trained, variables, importing, run, fails, tmp_path):
    file, new, argv = importing
    write_state_dict(file, to_torch(variables))
    printed = run(*argv, "--", *FLAGS).splitlines()
    assert printed == [
        f"{file}: 14 tensors of mlp",
        f"{new} holds the network as of step 0: python eval.py {new}",
    ]
    _, imported = load_run(new).restore()
    for name in ("mean", "var"):
        np.testing.assert_array_equal(
            imported.batch_stats["bn_1"][name], variables["batch_stats"]["bn_1"][name]
        )
    expected = evaluated(trained("digits"), tmp_path)
    assert evaluated(new, tmp_path) == {**expected, "step": 0}
    record = json.loads((new / "config.json").read_text())
    assert record["made_by"] == {"command": "import-torch", "file": str(file)}
    assert record["data"] == {
        "name": "digits",
        "image_shape": [8, 8],
        "classes": 10,
        "max_value": 16,
        "class_names": None,
    }

    assert "holds a run already" in fails(*argv, "--", *FLAGS, status=2)
    argv[-1] = tmp_path / "other"
    # Another width than the weights have.
    assert "(12, 64)" in fails(*argv)
    message = fails(*argv, "--names", "dense_0", "--", *FLAGS, status=2)
    assert "expected TORCH=FLAX" in message
    argv[3] = "digts"
    assert "Did you mean 'digits'?" in fails(*argv, "--", *FLAGS, status=2)
    assert not (tmp_path / "other").exists()


def test_names_of_another_kind(variables, importing, run, fails, tmp_path):
    file, new, argv = importing
    theirs = {
        "features.{i}.linear": "dense_{i}",
        "features.{i}.norm": "bn_{i}",
        "head": "logits",
    }
    tensors = to_torch(variables, theirs)
    assert "features.0.linear.weight" in tensors
    write_state_dict(file, tensors | {"aux.weight": np.ones((2, 2), np.float32)})
    mapping = tmp_path / "mapping.json"
    mapping.write_text(format_mapping(theirs))
    names = [f"{name}={ours}" for name, ours in theirs.items()]
    assert "no place for aux.weight" in fails(*argv, "--names", *names, "--", *FLAGS)
    for flags in (["--names", *names], ["--mapping", mapping, "--force"]):
        run(*argv, *flags, "--ignore", "aux", "--", *FLAGS)
        _, imported = load_run(new).restore()
        jax.tree.map(
            np.testing.assert_array_equal, imported.params, variables["params"]
        )
    flags = ["--names", *names[:2], "--ignore", "head", "aux", "--keep", "logits"]
    run(*argv, "--force", *flags, "--", *FLAGS)
    _, imported = load_run(new).restore()
    assert np.any(
        imported.params["logits"]["kernel"] != variables["params"]["logits"]["kernel"]
    )


def test_a_proposal_is_confirmed(importing, run, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_import_nets.py").write_text(
        "from flax import linen as nn\n"
        "class Net(nn.Module):\n"
        "    classes: int\n"
        "    @nn.compact\n"
        "    def __call__(self, x, *, train):\n"
        "        x = nn.Conv(4, (3, 3))(x[..., None]).reshape(len(x), -1)\n"
        "        x = nn.Dense(6, name='b')(x)\n"
        "        x = nn.Dense(6, name='a')(x)\n"
        "        return nn.Dense(self.classes)(x)\n"
    )
    file, new, argv = importing
    rng = np.random.default_rng(0)
    shapes = {"0": (4, 1, 3, 3), "1": (6, 256), "2": (6, 6), "3": (10, 6)}
    tensors = {f"{n}.weight": rng.normal(size=s) for n, s in shapes.items()}
    tensors |= {f"{n}.bias": rng.normal(size=s[0]) for n, s in shapes.items()}
    write_state_dict(file, tensors)
    argv += ["--model", "own_import_nets:Net"]
    message = fails(*argv)
    proposed = {"0": "Conv_0", "1": Layer("b", channels=4), "2": "a", "3": "Dense_0"}
    assert "was not imported: no mapping is known for own_import_nets:Net" in message
    assert format_mapping(proposed) in message
    assert "because other layers have the same shapes: none" in message
    assert not new.exists()
    run(*argv, "--confirm")
    _, state = load_run(new, trust=True).restore()
    rows = np.arange(256).reshape(4, 64).T.ravel()
    expected = tensors["1.weight"].T[rows].astype(np.float32)
    np.testing.assert_array_equal(state.params["b"]["kernel"], expected)


@pytest.mark.slow
def test_without_the_data_set(run, fails, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    file, new = tmp_path / "weights.safetensors", tmp_path / "new"
    argv = ["import-torch", file, "--preset", "cifar10-resnet20", "--output", new]
    described = {"image_shape": (32, 32, 3), "classes": 7}
    flags = ["--model.width", "0.25"]

    def program_of(config):
        return Program(config, Source.from_description(config.data, described))

    _, config = parse_train(["cifar10-resnet20", *flags])
    state = program_of(config).initial_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.float32(rng.uniform(1, 2, x.shape)), variables
    )
    torchvision = {
        "conv1": "conv1/conv",
        "bn1": "conv1/bn",
        "layer{i}.{j}.conv{k}": "stage{i}_block{j+1}/conv{k}/conv",
        "layer{i}.{j}.bn{k}": "stage{i}_block{j+1}/conv{k}/bn",
        "fc": "logits",
    }
    write_state_dict(file, to_torch(variables, torchvision))
    message = fails(*argv, "--", *flags)
    assert "is not prepared" in message
    assert "--image-shape HEIGHT WIDTH CHANNELS" in message
    shape = ["--image-shape", 32, 32, 3]
    assert "expected the height" in fails(*argv, "--image-shape", 32, status=2)
    run(*argv, *shape, "--", *flags)
    recorded = json.loads((new / "config.json").read_text())["data"]
    assert recorded["image_shape"] == [32, 32, 3]
    assert recorded["classes"] == 7
    config = read_config(new)
    assert config.data.name == "cifar10"
    program = program_of(config)
    with open_checkpoints(new, config, read_only=True) as found:
        state, _ = found.restore(program.initial_state())
    jax.tree.map(np.testing.assert_array_equal, state.params, variables["params"])
    # The size of images may be the configuration's.
    run(*argv, "--force", "--", *flags, "--data.image-size", 40)
    recorded = json.loads((new / "config.json").read_text())["data"]
    assert recorded["image_shape"] == [40, 40, 3]
    source = Source.from_description(DataConfig(image_size=40), recorded)
    assert (source.resize.size, source.classes, source.max_value) == (40, 7, 255)
