"""ONNX models of folded networks, and the int8 ones of docs/library/onnx.md."""

import doctest
import functools
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import models
from bnjax.folding import fold_batch_norm, fold_nnx
from bnjax.interop.export import ExportError
from bnjax.interop.onnx import to_onnx
from bnjax.interop.torch import from_torch, known_mapping, to_torch
from bnjax.models import Normalization
from tests.networks import Network

NOT_TESTED = "ONNX is NOT tested here: pip install -r requirements-onnx.txt"
onnx = pytest.importorskip("onnx", reason=NOT_TESTED)
pytest.importorskip("onnxruntime", reason=NOT_TESTED)
pytest.importorskip("jax2onnx", reason=NOT_TESTED)

PAGE = Path(__file__).parents[2] / "docs/library/onnx.md"
NORMALIZATION = {"BatchNormalization", "Mul", "Sqrt", "Sub"}
NETWORKS = {
    "lenet": ((28, 28, 1), {}),
    "resnet18": ((48, 48, 3), {"width": 0.125}),
    "resnet20": ((16, 16, 3), {"width": 0.25}),
    "inception": ((64, 64, 3), {"width": 0.0625}),
}


@pytest.fixture(scope="module")
def page():
    """The names of the page, its network trained on digits and quantized."""
    text, *_ = PAGE.read_text("utf-8").split("\n## A ResNet-18")
    names = {}
    for example in doctest.DocTestParser().get_examples(text):
        exec(compile(example.source, str(PAGE), "single"), names)
    return names


@functools.cache
def network(name):
    """A network, an input, and variables with statistics that change the result."""
    shape, options = NETWORKS[name]
    model = models.create(name, classes=10, **options)
    x = jax.random.normal(jax.random.key(1), (7, *shape))
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def change(path, leaf):
        leaf = np.asarray(leaf)
        if path[-1].key in {"scale", "var"}:
            return np.float32(rng.uniform(0.8, 1.2, leaf.shape))
        if path[-1].key in {"bias", "mean"}:
            return np.float32(rng.uniform(-0.2, 0.2, leaf.shape))
        return leaf

    variables = jax.tree_util.tree_map_with_path(change, variables)

    @jax.jit
    def predict(variables, x):
        return model.apply(variables, x, train=False)

    return predict, variables, x


def batch_of(name):
    """The batch to convert with; jax2onnx pads only if its size is known."""
    return len(network(name)[2]) if name == "resnet20" else None


@functools.cache
def folded_network(name):
    return fold_batch_norm(*network(name))


def operations(model):
    """How often the graph has each operation, bar those that compute nothing."""
    counts = Counter(node.op_type for node in model.graph.node)
    for name in ("Cast", "Concat", "Expand", "Reshape", "Shape", "Transpose"):
        del counts[name]
    return counts


def assert_same(run, model, x, expected):
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "B" or batch.dim_value == len(x)
    for size in (1, 3, len(x)) if batch.dim_param else (len(x),):
        got = run(model, x[:size])
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected[:size], rtol=0, atol=atol)


@pytest.mark.parametrize("name", NETWORKS)
def test_folded(page, name):
    """The outputs of JAX, for any batch size, and no operation of a normalization."""
    predict, variables, x = network(name)
    convert = functools.partial(to_onnx, example=x, batch_size=batch_of(name))
    folded = folded_network(name)
    assert all(layer.into for layer in folded.report)
    model = convert(folded, None)
    assert_same(page["run"], model, x, predict(variables, x))

    options = {**NETWORKS[name][1], "normalization": Normalization(kind="none")}
    plain = models.create(name, classes=10, **options)
    without = convert(functools.partial(plain.apply, train=False), folded.variables)
    assert operations(model) == operations(without)
    assert not NORMALIZATION & set(operations(model))


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_not_folded(page, name):
    """The outputs of JAX too, with operations for each batch normalization."""
    predict, variables, x = network(name)
    model = to_onnx(predict, variables, x, batch_size=batch_of(name))
    assert_same(page["run"], model, x, predict(variables, x))
    layers = len(folded_network(name).report)
    counts = operations(model)
    assert (counts["Sub"], counts["Sqrt"]) == (layers, layers)


def test_layer_that_cannot_be_folded(page):
    """It stays as (x - mean) * scale + bias."""

    class PreActivation(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = bnjax.linen.BatchNorm(use_running_average=True, name="bn")
            return x + nn.Conv(3, (3, 3))(nn.relu(norm(x)))

    block, x = PreActivation(), jax.random.normal(jax.random.key(1), (7, 8, 8, 3))
    variables = block.init(jax.random.key(0), x)
    variables["batch_stats"]["bn"]["mean"] = jnp.array([0.5, -0.5, 1.0])
    folded = fold_batch_norm(block.apply, variables, x)
    model = to_onnx(folded, None, x)
    assert_same(page["run"], model, x, block.apply(variables, x))
    assert operations(model) == Counter(Sub=1, Mul=1, Add=3, Relu=1, Conv=1)


def test_nnx(page):
    model = Network(bnjax.nnx.BatchNorm, nnx.Rngs(0))
    model.norm.mean[...] = jnp.array([0.5, -0.5, 1.0, 0.1])
    model.eval()
    x = jax.random.normal(jax.random.key(1), (7, 8, 8, 3))
    converted = to_onnx(fold_nnx(model, x), None, x)
    assert_same(page["run"], converted, x, model(x))
    assert not NORMALIZATION & set(operations(converted))


@pytest.mark.parametrize("opset", [17, 21, 23])
def test_resnet_of_torch(page, opset):
    """Weights with the names of torchvision; an input in the layout of PyTorch."""
    predict, variables, x = network("resnet18")
    mapping = known_mapping("resnet18")
    shapes = jax.eval_shape(lambda: variables)
    carried = from_torch(to_torch(variables, mapping), shapes, mapping)
    folded = fold_batch_norm(predict, carried, x)
    model = to_onnx(folded, None, x, channels_first=True, opset=opset)
    assert model.opset_import[0].version == opset
    expected = predict(variables, x)
    assert_same(page["run"], model, x.transpose(0, 3, 1, 2), expected)
    counts = operations(model)
    assert (counts["Conv"], counts["Relu"], counts["MaxPool"]) == (20, 17, 1)


@pytest.mark.parametrize("kind", ["folded", "unfolded"])
def test_int8(page, kind):
    """At most 0.02 of the accuracy on digits is lost, and weights are 8 bits."""
    network = {"folded": page["digits"], "unfolded": page["unfolded"]}[kind]
    x, path = page["test_images"], page["folder"] / f"{kind}-int8.onnx"
    before = page["accuracy"](page["run"](network, x))
    after = page["accuracy"](page["run"](path, x))
    assert before > 0.95
    assert after > before - 0.02
    arrays = onnx.load(path).graph.initializer
    kernels = [a for a in arrays if list(a.dims[2:]) == [3, 3]]
    assert [a.data_type for a in kernels] == [onnx.TensorProto.INT8] * 3


@pytest.mark.parametrize("opset", [17, 23])
def test_relu_is_not_a_maximum_with_other_numbers(page, opset):
    """What is rewritten is a maximum with 0, not with 1 or with an array."""

    def function(x):
        return jnp.maximum(jnp.maximum(x, 1), jnp.zeros((3,)).at[1].set(2))

    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 2
    model = to_onnx(function, None, x, opset=opset)
    np.testing.assert_array_equal(page["run"](model, x), function(x))


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((3, 2), (1, 2), "SAME"),
    ],
)
def test_poolings(page, window, strides, padding):
    x = jax.random.normal(jax.random.key(0), (5, 9, 8, 3))

    def function(x):
        return nn.max_pool(x, window, strides=strides, padding=padding) + 1

    np.testing.assert_allclose(
        page["run"](to_onnx(function, None, x), x), function(x), rtol=1e-6
    )


def test_what_cannot_be_converted():
    x = jnp.ones((2, 4))
    with pytest.raises(ExportError, match="returns 2 arrays; expected one"):
        to_onnx(lambda x: (x, x), None, x)
    with pytest.raises(ExportError, match=r"shape \(2, 4\); expected \(batch, height"):
        to_onnx(lambda x: x, None, x, channels_first=True)
    with pytest.raises(ExportError, match=r"(?s)cannot convert.*Pass batch_size"):
        to_onnx(lambda x: jnp.pad(x, ((0, 0), (1, 1))), None, x)
    with pytest.raises(ValueError, match="Incompatible shapes"):
        to_onnx(lambda x: x + jnp.ones(5), None, x)


def test_pinned_versions():
    """The page names the versions that requirements-onnx.txt pins."""
    pins = PAGE.parents[2] / "requirements-onnx.txt"
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", pins.read_text(), re.MULTILINE))
    text = PAGE.read_text("utf-8")
    assert f"jax2onnx {pinned['jax2onnx']}" in text
    assert f"ONNX Runtime {'.'.join(pinned['onnxruntime'].split('.')[:2])}" in text
    shared = PAGE.parents[2] / "requirements.txt"
    lines = {line.partition(";")[0] for line in shared.read_text().splitlines()}
    ours = {"jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "flatbuffers"}
    for line in pins.read_text().splitlines():
        if re.split("==", line)[0] in ours:
            assert line in lines
