"""Exported functions: the same numbers, where neither Flax nor bnjax is."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import models
from bnjax._files import OutputError
from bnjax.folding import fold_batch_norm
from bnjax.interop.export import ExportError, export_inference, load, save, trailer

READER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "bnjax", "orbax", "optax"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Refuse())
import jax
import numpy as np

inputs, outputs, *programs = sys.argv[1:]
given = np.load(inputs)
found = {}
for number, program in enumerate(programs):
    with open(program, "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    found |= {f"{number} {name}": exported.call(given[name]) for name in given}
np.savez(outputs, **found)
assert not {"flax", "bnjax"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def network():
    """A LeNet with statistics and parameters that change the result."""
    model = models.create("lenet", classes=10)
    x = jnp.zeros((1, 28, 28, 1))
    variables = jax.jit(lambda key, x: model.init(key, x, train=False))(
        jax.random.key(0), x
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (
            np.float32(rng.uniform(0.5, 1.5, leaf.shape)) * leaf
            + np.float32(rng.uniform(0, 0.3, leaf.shape))
        ),
        variables,
    )
    return lambda v, x: model.apply(v, x, train=False), variables


@pytest.fixture(scope="module")
def exported(network):
    return export_inference(*network, jax.ShapeDtypeStruct((3, 28, 28, 1), jnp.float32))


@pytest.fixture(scope="module")
def written(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "lenet.stablehlo"
    save(exported, path)
    return path


@pytest.fixture
def refused():
    def call(function, *args, error=ExportError, **kwargs):
        with pytest.raises(error) as caught:
            function(*args, **kwargs)
        return str(caught.value)

    return call


@pytest.mark.slow
def test_runs_where_jax_alone_is(network, written, tmp_path):
    apply, variables = network
    rng = np.random.default_rng(1)
    inputs = {
        str(size): rng.normal(size=(size, 28, 28, 1)).astype(np.float32)
        for size in (1, 7, 64)
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    folded = fold_batch_norm(apply, variables, inputs["1"])
    save(export_inference(folded, None, inputs["1"]), tmp_path / "folded.stablehlo")
    argv = [tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    argv += [written, tmp_path / "folded.stablehlo"]
    subprocess.run([sys.executable, "-c", READER, *map(str, argv)], check=True)
    outputs = np.load(tmp_path / "outputs.npz")
    run = jax.jit(apply)
    for name, x in inputs.items():
        expected = run(variables, x)
        plain, without = outputs[f"0 {name}"], outputs[f"1 {name}"]
        assert plain.shape == (int(name), 10)
        np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(without, folded(x), rtol=0, atol=1e-6)
        np.testing.assert_allclose(without, expected, rtol=0, atol=1e-5)
        assert np.ptp(expected) > 0.1


def test_loaded(network, written):
    apply, variables = network
    loaded = load(written)
    assert [str(side) for side in loaded.input_shape] == ["b", "28", "28", "1"]
    assert (loaded.input_dtype, loaded.platforms) == (
        np.float32,
        ("cpu", "cuda", "tpu"),
    )
    x = np.random.default_rng(2).normal(size=(5, 28, 28, 1)).astype(np.float32)
    expected = jax.jit(apply)(variables, x)
    np.testing.assert_allclose(loaded(x), expected, rtol=0, atol=1e-6)


def test_lowered_for_every_platform(network, exported):
    assert exported.platforms == ("cpu", "cuda", "tpu")
    calls = set(re.findall(r"custom_call @(\w+)", exported.mlir_module()))
    # What checks that there is an example; everything else is StableHLO.
    assert calls <= {"shape_assertion"}
    for platform in ("cuda", "tpu", "rocm"):
        alone = export_inference(
            *network, jnp.zeros((1, 28, 28, 1)), platforms=[platform]
        )
        assert alone.platforms == (platform,)


def test_size_is_that_of_the_variables(network, written):
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(network[1]))
    assert held < written.stat().st_size < held + 40_000


def test_fixed_batch():
    def by_size(x):
        return x if x.shape[0] > 3 else 2 * x

    x = jnp.ones((4, 2))
    exported = export_inference(by_size, None, x, batch_size=2)
    assert exported.in_avals[0].shape == (2, 2)
    np.testing.assert_array_equal(exported.call(x[:2]), 2 * x[:2])


def test_not_for_every_batch_size(refused):
    message = refused(
        export_inference, lambda x: x if x.shape[0] > 3 else 2 * x, None, jnp.ones(4)
    )
    assert "cannot be exported for every batch size: " in message
    assert "'b'" in message
    assert "batch_size=N" in message


def test_what_is_wrong_with_the_function_is_told_as_it_is():
    with pytest.raises(TypeError, match="dot_general"):
        export_inference(lambda w, x: x @ w, jnp.ones((3, 1)), jnp.ones((2, 4)))


def test_a_function_that_no_other_process_can_run(refused):
    def prints(x):
        jax.debug.callback(lambda x: None, x)
        return x

    message = refused(export_inference, prints, None, jnp.ones(2), platforms=["cpu"])
    assert message.startswith("the function cannot be exported: ")
    assert "callback" in message


def test_wrong_arguments(refused):
    x = jnp.ones((2, 3))
    assert "Did you mean 'cuda'?" in refused(
        export_inference, jnp.sin, None, x, platforms=["cud"]
    )
    assert "A GPU is cuda" in refused(
        export_inference, jnp.sin, None, x, platforms="gpu"
    )
    assert "no platform" in refused(export_inference, jnp.sin, None, x, platforms=[])
    assert "expected 1 or more" in refused(
        export_inference, jnp.sin, None, x, batch_size=0
    )
    assert "no dimension" in refused(export_inference, jnp.sin, None, jnp.ones(()))


def test_what_does_not_fit(written, refused):
    loaded = load(written)
    for shape in ((28, 28, 1), (2, 28, 27, 1), (0, 28, 28, 1), (2, 28, 28, 1, 1)):
        message = refused(loaded, np.zeros(shape, np.float32))
        assert f"x has shape {shape}; expected (b, 28, 28, 1)" in message
    message = refused(loaded, np.zeros((2, 28, 28, 1), np.uint8))
    assert "x has dtype uint8; expected float32" in message


def test_where_a_file_can_go(exported, written, refused, tmp_path):
    before = written.read_bytes()

    def refusal(path):
        return refused(save, exported, path, error=OutputError)

    assert "exists already" in refusal(written)
    assert "is a folder" in refusal(tmp_path)
    assert "is in a folder that does not exist" in refusal(tmp_path / "no" / "file")
    for name in ("net.onnx", "net.pb", "net"):
        message = refusal(tmp_path / name)
        assert "expected .stablehlo" in message
        assert "bnjax.interop.onnx.to_onnx" in message
    assert written.read_bytes() == before
    path = tmp_path / "file.stablehlo"
    path.write_text("old")
    save(exported, path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files(written, refused, tmp_path):
    content = bytearray(written.read_bytes())
    path = tmp_path / "file.stablehlo"
    assert "could not be read" in refused(load, path)
    for text in (b"", b"hello", content[:1000], content[:-1000], content[:-90]):
        path.write_bytes(text)
        assert "is not an exported function, or is cut short" in refused(load, path)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is damaged" in refused(load, path)


def test_another_platform(refused, tmp_path):
    path = tmp_path / "file.stablehlo"
    here = jax.export.default_export_platform()
    other = "tpu" if here != "tpu" else "cuda"
    save(export_inference(jnp.sin, None, jnp.ones(2), platforms=[other]), path)
    message = refused(load, path)
    assert f"was exported for {other}, and JAX runs on {here} here" in message


def test_another_version(network, exported, refused, tmp_path, monkeypatch):
    x = np.ones((3, 28, 28, 1), np.float32)
    expected = exported.call(x)
    path = tmp_path / "file.stablehlo"
    program = bytearray(exported.mlir_module_serialized)
    # As one of a later version: MLIR refuses the bytecode's number.
    program[4] = 99
    later = dataclasses.replace(exported, mlir_module_serialized=bytes(program))
    with monkeypatch.context() as patched:
        patched.setattr(jax, "__version__", "9.9")
        save(exported, path)
        save(later, tmp_path / "later.stablehlo")
        (tmp_path / "other").write_bytes(bytes(100) + trailer(bytes(100)))
    np.testing.assert_array_equal(load(path)(x), expected)
    for name in ("later.stablehlo", "other"):
        message = refused(load, tmp_path / name)
        assert "was written by JAX 9.9, and JAX " in message
        assert f"JAX {jax.__version__} cannot read it" in message


def test_more_than_one_input(refused, tmp_path):
    pair = jax.export.export(jax.jit(jnp.add))(jnp.ones(2), jnp.ones(2))
    assert "takes 2 arrays; expected one" in refused(
        save, pair, tmp_path / "file.stablehlo"
    )


def test_without_flatbuffers(exported, written, refused, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith(("flatbuffers", "jax._src.export.serialization")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    advice = "pip install flatbuffers"
    assert advice in refused(save, exported, tmp_path / "file.stablehlo")
    assert advice in refused(load, written)
    assert list(tmp_path.iterdir()) == []
