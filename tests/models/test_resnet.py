import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import models
from bnjax.interop.torch import RESNET, from_torch
from bnjax.models import Normalization, ResNet
from bnjax.models.layers import ConvNorm
from bnjax.models.resnet import SIZES, Block, Bottleneck
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


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (18, 11_689_512),
        pytest.param(34, 21_797_672, marks=pytest.mark.slow),
        (50, 25_557_032),
        pytest.param(101, 44_549_160, marks=pytest.mark.slow),
        pytest.param(152, 60_192_808, marks=pytest.mark.slow),
    ],
)
def test_how_many_parameters_for_large_images(depth, parameters):
    # torchvision's counts.
    model = models.create(f"resnet{depth}")
    assert count(model, jnp.zeros((1, 224, 224, 3))) == parameters


def torch_resnet(torch, blocks, bottleneck, first, classes):
    """A residual network as torchvision has it, with names of its modules."""
    nn = torch.nn

    class TorchBlock(nn.Module):
        def __init__(self, channels, width, stride):
            super().__init__()
            wide = 4 * width if bottleneck else width
            sizes = [(channels, width, 3, stride), (width, width, 3, 1)]
            if bottleneck:
                sizes = [(channels, width, 1, 1), (width, width, 3, stride)]
                sizes.append((width, wide, 1, 1))
            self.depth = len(sizes)
            for i, (ins, out, kernel, step) in enumerate(sizes, start=1):
                conv = nn.Conv2d(ins, out, kernel, step, kernel // 2, bias=False)
                self.add_module(f"conv{i}", conv)
                self.add_module(f"bn{i}", nn.BatchNorm2d(out))
            self.downsample = nn.Sequential()
            if stride != 1 or channels != wide:
                conv = nn.Conv2d(channels, wide, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(wide))

        def forward(self, x):
            y = x
            for i in range(1, self.depth + 1):
                y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
                y = y.relu() if i < self.depth else y
            return (y + self.downsample(x)).relu()

    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, first, 7, 2, 3, bias=False))
    model.add_module("bn1", nn.BatchNorm2d(first))
    model.add_module("relu", nn.ReLU())
    model.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
    channels = first
    for stage, repeats in enumerate(blocks):
        width, made = first * 2**stage, []
        for i in range(repeats):
            made.append(TorchBlock(channels, width, 2 if stage and not i else 1))
            channels = 4 * width if bottleneck else width
        model.add_module(f"layer{stage + 1}", nn.Sequential(*made))
    model.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(channels, classes))
    return model


@pytest.mark.parametrize(
    ("depth", "width"),
    [
        (18, 0.125),
        (50, 0.125),
        *(pytest.param(d, 0.125, marks=pytest.mark.slow) for d in (34, 101, 152)),
        pytest.param(50, 1.0, marks=pytest.mark.slow),
    ],
)
def test_live_torch_gives_our_outputs(depth, width):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    size, first = SIZES[depth], int(64 * width)
    theirs = torch_resnet(torch, size.blocks, size.bottleneck, first, 7).eval()
    rng = np.random.default_rng(0)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in (
                (module.weight.data, 0.5),
                (module.bias.data, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                values = rng.uniform(low, low + 1, tensor.shape)
                tensor.copy_(torch.from_numpy(values))
    ours = ResNet(depth, classes=7, width=width)
    x = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    variables = from_torch(theirs.state_dict(), shapes_of(ours, x), RESNET)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jit(lambda v, x: ours.apply(v, x, train=False))(variables, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, rtol=0, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 1e-3 * scale


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
@pytest.mark.parametrize(
    ("features", "stride", "project"),
    [(4, 1, False), (7, 2, False), (4, 1, True), (7, 2, True)],
)
def test_a_block(features, stride, project, kind, x64):
    x = np.random.default_rng(0).normal(1, 2, (3, 6, 5, 4))
    block = Block(features, stride, False, make_conv(kind), project)
    variables = random_variables(block, x)
    params = as_numpy(variables["params"])
    shortcut = np.zeros((3, -(-6 // stride), -(-5 // stride), features))
    first = (features - 4) // 2
    shortcut[..., first : first + 4] = x[:, ::stride, ::stride]
    assert ("projection" in params) == (project and features != 4)
    if "projection" in params:
        shortcut = layers.conv_norm(
            x, params["projection"], stride, activate=lambda x: x
        )
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
        (ResNet(21), "depth=21; expected one of 18, 20, 34, 50, 56, "),
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
