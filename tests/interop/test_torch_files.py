"""Files of PyTorch's weights: read without running code, written whole."""

import errno
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from bnjax.interop.torch import Layer
from bnjax.interop.torch_files import (
    format_mapping,
    read_mapping,
    read_state_dict,
    write_state_dict,
)

STATE = {
    "layer.10.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "layer.2.weight": np.array([0.5, -1.5], ml_dtypes.bfloat16),
    "layer.2.num_batches_tracked": np.asarray(3, np.int64),
    "layer.2.half": np.array([[1.0]], np.float16),
    "layer.2.double": np.array([1 / 3]),
}


def assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        np.testing.assert_array_equal(actual[name], value)


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, STATE)
    found = read_state_dict(str(path))
    assert_equal(found, STATE)
    assert list(found)[-1] == "layer.10.weight"
    assert b'"format":"pt"' in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_safetensors_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, STATE)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
            read_state_dict(path)


@pytest.mark.parametrize("function", [read_state_dict, write_state_dict])
@pytest.mark.parametrize("name", ["weights.npz", "weights"])
def test_other_kinds_of_file(tmp_path, name, function):
    path = tmp_path / name
    np.savez(path, a=np.ones(2))
    arguments = (path, STATE) if function is write_state_dict else (path,)
    with pytest.raises(ValueError, match=r"expected a file of PyTorch weights: \.safe"):
        function(*arguments)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.pt is not there"):
        read_state_dict(tmp_path / "gone.pt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_state_dict(tmp_path / "folder.safetensors")


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, {"a": np.ones(1)})
    with pytest.raises(ValueError, match="exists already"):
        write_state_dict(path, {"a": np.zeros(1)})
    assert read_state_dict(path)["a"] == 1
    write_state_dict(path, {"a": np.zeros(1)}, overwrite=True)
    assert read_state_dict(path)["a"] == 0


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, {"a": np.ones(1)})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="could not be written: No space left"):
        write_state_dict(path, {"a": np.zeros(1)}, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    assert read_state_dict(path)["a"] == 1


@pytest.mark.parametrize(
    ("package", "name"),
    [("safetensors.numpy", "weights.safetensors"), ("torch", "weights.pt")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    message = f"needs .*{package.split('.')[0]}.*pip install"
    with pytest.raises(ValueError, match=f"(?i){message}"):
        read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match=f"(?i){message}"):
        write_state_dict(tmp_path / f"new-{name}", STATE)


class Tensor:
    """As much of a tensor of PyTorch as is asked for."""

    dtype = "torch.float32"

    def __init__(self, *values):
        self.values = np.array(values, np.float32)

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return self.values


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A file, and a torch in whose place `load` is to be set."""
    torch = types.SimpleNamespace(__version__="2.6.0+cpu", load=None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"PK")
    return torch, path


def test_torch_is_told_to_read_tensors_alone(stub):
    torch, path = stub
    given = {}

    def load(path, **options):
        given.update(options)
        return {"a": Tensor(1, 2)}

    torch.load = load
    assert_equal(read_state_dict(path), {"a": np.array([1, 2], np.float32)})
    assert given == {"map_location": "cpu", "weights_only": True}


def test_a_torch_whose_check_can_be_passed_is_not_used(stub):
    torch, path = stub
    torch.__version__ = "2.5.1"
    with pytest.raises(ValueError, match=r"PyTorch 2\.5\.1.*expected 2\.6 or newer"):
        read_state_dict(path)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_within_a_checkpoint_are_found(stub, capsys, key):
    torch, path = stub
    weights = {"module.a.weight": Tensor(1), "module.a.bias": Tensor(2)}
    torch.load = lambda *_, **__: {"epoch": 3, key: weights, "optimizer": {}}
    assert_equal(
        read_state_dict(path),
        {"a.weight": np.ones(1, np.float32), "a.bias": np.full(1, 2, np.float32)},
    )
    said = capsys.readouterr().err
    assert f"took the weights under '{key}'" in said
    assert "removed 'module.' before names" in said


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}])
def test_a_file_without_weights(stub, content):
    torch, path = stub
    torch.load = lambda *_, **__: content
    with pytest.raises(ValueError, match="expected tensors by name"):
        read_state_dict(path)


class Reduced:
    """Calls a function where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_live_a_pickle_with_code_is_refused_and_not_run(tmp_path, how):
    torch = pytest.importorskip("torch")
    path, ran = tmp_path / "weights.pt", tmp_path / "ran"
    code = Reduced(os.mkdir, str(ran))
    if how == "pickle":
        path.write_bytes(pickle.dumps({"b": code}, protocol=2))
    else:
        content = {"a": torch.ones(2), "b": code}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"was refused.*could run code"):
        read_state_dict(path)
    assert not ran.exists()


@pytest.mark.parametrize("how", ["compressed", "zip", "legacy"])
def test_live_a_file_that_fills_the_memory_is_refused(tmp_path, how):
    torch = pytest.importorskip("torch")
    path, plain = tmp_path / "weights.pt", tmp_path / "plain.pt"
    if how == "compressed":
        torch.save({"a": torch.zeros(2**20)}, plain)
        with (
            zipfile.ZipFile(plain) as given,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        ):
            for name in given.namelist():
                file.writestr(name, given.read(name))
        assert path.stat().st_size < 2**14
    else:
        content = {"a": torch.ones(2), "b": Reduced(bytearray, 2**30)}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"was refused.*could fill the memory"):
        read_state_dict(path)


def test_live_a_tensor_that_is_no_array(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt: a is not a plain tensor"):
        read_state_dict(path)


def test_live_files_of_torch(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pt"
    write_state_dict(path, STATE)
    found = read_state_dict(path)
    assert_equal(found, STATE)
    assert list(found) == list(STATE)
    loaded = torch.load(path, weights_only=True)
    assert loaded["layer.2.weight"].dtype == torch.bfloat16
    assert loaded["layer.2.num_batches_tracked"].shape == ()

    model = torch.nn.DataParallel(torch.nn.BatchNorm1d(3))
    torch.save({"model": model.state_dict(), "epoch": 1}, path)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(read_state_dict(path)) == names
    assert "'model'" in capsys.readouterr().err

    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights\.pt"):
        read_state_dict(path)


def test_mappings(tmp_path):
    path = tmp_path / "mapping.json"
    mapping = {
        "layer{i}.conv": "stage{i}/conv",
        "fc1": Layer("dense1", channels=16),
        "up": Layer("", transposed=True),
        "conv.bias": Layer("bn", subtract=True),
        "aux": None,
    }
    path.write_text(format_mapping(mapping))
    assert read_mapping(path) == mapping
    assert format_mapping(mapping).splitlines()[2:5] == [
        '  "fc1": {"path": "dense1", "channels": 16},',
        '  "up": {"path": "", "transposed": true},',
        '  "conv.bias": {"path": "bn", "subtract": true},',
    ]
    for text in (
        "{",
        "[1]",
        '{"a": 1}',
        '{"a": {"channels": 2}}',
        '{"a": {"path": "b", "channels": "2"}}',
        '{"a": {"path": "b", "chanels": 2}}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"json could not be read as a mapping"):
            read_mapping(path)
    with pytest.raises(ValueError, match="could not be read"):
        read_mapping(tmp_path / "gone.json")
