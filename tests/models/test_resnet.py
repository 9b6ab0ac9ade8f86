import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import models
from bnjax.models import Normalization, ResNet
from bnjax.models.layers import ConvNorm
from bnjax.models.resnet import Block, Bottleneck
from tests.models import numpy_layers as layers
from tests.models.helpers import (
    as_numpy,
    count,
    jit,
    random_variables,
    shapes_of,
    train,
)


def plain(n):
    """Parameters of the network of 6n + 2 layers with 10 classes, worked out by hand.

    A convolution of 3x3 with BN has 9ab + 2b. The stem is 3 to 16; of each stage's 2n
    convolutions, the first of the second and third comes from half the channels.
    """

    def conv(a, b):
        return 9 * a * b + 2 * b

    stages = sum(
        conv(a, b) + (2 * n - 1) * conv(b, b) for a, b in [(16, 16), (16, 32), (32, 64)]
    )
    return conv(3, 16) + stages + 64 * 10 + 10


@pytest.mark.parametrize(
    ("name", "n", "parameters"),
    [
        ("resnet20", 3, 269_722),
        pytest.param("resnet56", 9, 853_018, marks=pytest.mark.slow),
        ("resnet110", 18, 1_727_962),
    ],
)
def test_how_many_parameters_for_small_images(name, n, parameters):
    found = count(models.create(name, classes=10), jnp.zeros((1, 32, 32, 3)))
    assert found == plain(n) == parameters


def test_how_many_parameters_for_large_images():
    # torchvision's count.
    found = count(models.create("resnet50"), jnp.zeros((1, 224, 224, 3)))
    assert found == 25_557_032


def make_conv(kind):
    def conv(features, kernel, stride=1, **options):
        return ConvNorm(
            features,
            kernel,
            stride,
            normalization=Normalization(kind),
            param_dtype=jnp.float64,
            **options,
        )

    return conv


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(("features", "stride"), [(4, 1), (7, 2)])
def test_a_block(features, stride, kind, x64):
    x = np.random.default_rng(0).normal(1, 2, (3, 6, 5, 4))
    block = Block(features, stride, False, make_conv(kind))
    variables = random_variables(block, x)
    params = as_numpy(variables["params"])
    shortcut = np.zeros((3, -(-6 // stride), -(-5 // stride), features))
    first = (features - 4) // 2
    shortcut[..., first : first + 4] = x[:, ::stride, ::stride]
    y = layers.conv_norm(x, params["conv1"], stride, 1)
    expected = layers.conv_norm(y, params["conv2"], 1, 1, shortcut)
    np.testing.assert_allclose(train(block, variables, x), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(("features", "stride"), [(1, 1), (2, 1), (2, 2)])
def test_a_bottleneck(features, stride, kind, x64):
    x = np.random.default_rng(0).normal(1, 2, (3, 6, 5, 4))
    block = Bottleneck(features, stride, False, make_conv(kind))
    variables = random_variables(block, x)
    params, shortcut = as_numpy(variables["params"]), x
    assert ("projection" in params) == (features != 1)
    if features != 1:
        shortcut = layers.conv_norm(
            x, params["projection"], stride, activate=lambda x: x
        )
    y = layers.conv_norm(x, params["conv1"])
    y = layers.conv_norm(y, params["conv2"], stride, 1)
    expected = layers.conv_norm(y, params["conv3"], residual=shortcut)
    np.testing.assert_allclose(train(block, variables, x), expected, rtol=1e-9)


def outputs(model, images):
    found = jax.eval_shape(
        lambda: model.init_with_output(
            jax.random.key(0), images, train=False, capture_intermediates=True
        )
    )[1]["intermediates"]
    return {
        name: layer["__call__"][0].shape[1:]
        for name, layer in found.items()
        if name.startswith("stage")
    }


def test_the_stages_are_of_the_papers_sizes():
    found = outputs(ResNet(20), jnp.zeros((1, 32, 32, 3)))
    assert [found[f"stage{i}_block3"] for i in (1, 2, 3)] == [
        (32, 32, 16),
        (16, 16, 32),
        (8, 8, 64),
    ]
    found = outputs(ResNet(50), jnp.zeros((1, 224, 224, 3)))
    assert len(found) == 3 + 4 + 6 + 3
    assert [found[f"stage{i}_block3"] for i in (1, 2, 3, 4)] == [
        (56, 56, 256),
        (28, 28, 512),
        (14, 14, 1024),
        (7, 7, 2048),
    ]


@pytest.mark.parametrize(
    ("block", "features", "last"), [(Block, 4, "conv2"), (Bottleneck, 1, "conv3")]
)
def test_with_a_zero_scale_a_block_starts_as_the_identity(block, features, last, x64):
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (3, 6, 5, 4)))
    layer = block(features, 1, True, make_conv("batch"))
    variables = jit(lambda: layer.init(jax.random.key(0), x, train=False))()
    np.testing.assert_array_equal(variables["params"][last]["bn"]["scale"], 0)
    np.testing.assert_allclose(train(layer, variables, x), x, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ResNet(21), "depth=21; expected one of 20, 50, 56, 110"),
        (
            ResNet(20, zero_scale=True, normalization=Normalization("none")),
            "which has no scale",
        ),
        (ResNet(20, width=-1.0), "width=-1.0"),
    ],
)
def test_what_it_refuses(model, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(model, jnp.zeros((1, 32, 32, 3)))
