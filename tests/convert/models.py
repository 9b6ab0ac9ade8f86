"""Models to convert, of flax.nnx and flax.linen, and how they are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from bnjax.convert import ToBatchNorm, ToFrozen, convert
from bnjax.models import Inception, Normalization, ResNet

SAME = {
    "ours": ToBatchNorm(),
    "shared": ToBatchNorm(axis_name="data"),
    "frozen": ToFrozen(),
    "virtual": ToBatchNorm(virtual_batch_size=2),
}


def images(shape=(6, 8, 8, 3), dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 2 + 1, dtype)


class Bottleneck(nnx.Module):
    def __init__(self, inputs, features, stride, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.conv0, self.bn0 = conv(inputs, features, (1, 1)), norm(features)
        self.conv1 = conv(features, features, (3, 3), strides=stride)
        self.bn1 = norm(features)
        self.conv2 = conv(features, 2 * features, (1, 1))
        self.bn2 = norm(2 * features)
        self.shortcut = nnx.Sequential()
        if stride > 1 or inputs != 2 * features:
            projection = conv(inputs, 2 * features, (1, 1), strides=stride)
            self.shortcut = nnx.Sequential(projection, norm(2 * features))

    def __call__(self, x):
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = nnx.relu(self.bn1(self.conv1(y)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.blocks = nnx.List(
            [Bottleneck(6, 5, 2, rngs), Bottleneck(10, 5, 1, rngs)],
        )
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class MBConv(nnx.Module):
    def __init__(self, inputs, features, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        wide = 2 * inputs
        self.expand, self.bn0 = (
            conv(inputs, wide, (1, 1)),
            nnx.BatchNorm(wide, rngs=rngs),
        )
        self.depthwise = conv(wide, wide, (3, 3), feature_group_count=wide)
        self.bn1 = nnx.BatchNorm(wide, momentum=0.9, epsilon=1e-3, rngs=rngs)
        self.squeeze = nnx.Conv(wide, 2, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(2, wide, (1, 1), rngs=rngs)
        self.project, self.bn2 = (
            conv(wide, features, (1, 1)),
            nnx.BatchNorm(features, rngs=rngs),
        )

    def __call__(self, x):
        y = nnx.silu(self.bn0(self.expand(x), use_running_average=True))
        y = nnx.silu(self.bn1(self.depthwise(y), True))
        gate = self.excite(nnx.silu(self.squeeze(y.mean((1, 2), keepdims=True))))
        return self.bn2(self.project(y * nnx.sigmoid(gate)), use_running_average=True)


class NnxEfficientNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([MBConv(3, 6, rngs), MBConv(6, 6, rngs)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.blocks[0](x)
        return self.head((x + self.blocks[1](x)).mean((1, 2)))


NNX = {"resnet": (NnxResNet, 8), "efficientnet": (NnxEfficientNet, 6)}


def nnx_model(name):
    """A model with every variable away from where it starts."""
    model = NNX[name][0](nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for layer in layers_of(model).values():
        for variable in (layer.mean, layer.bias):
            variable[...] = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
        for variable in (layer.var, layer.scale):
            drawn = rng.uniform(0.5, 2, variable.shape)
            variable[...] = jnp.asarray(drawn, jnp.float32)
    return model


def layers_of(model, kind=nnx.BatchNorm):
    modules = nnx.iter_modules(model)
    return {
        "/".join(map(str, path)): each
        for path, each in modules
        if isinstance(each, kind)
    }


def leaves(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, got, want)


def linen_model(name, **normalization):
    options = {"unbiased": False, "momentum": 0.9, **normalization}
    normalization = Normalization(**options)
    if name == "resnet":
        return ResNet(20, classes=3, width=0.25, normalization=normalization)
    return Inception(classes=3, width=0.125, stem="small", normalization=normalization)


@functools.cache
def linen_variables(name):
    """Variables away from where they start, and images they are for."""
    x = images((6, 8, 8, 3))
    model = linen_model(name, kind="flax")
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), x
    )
    rng = np.random.default_rng(2)

    def moved(keys, leaf):
        kind = jax.tree_util.keystr(keys[-1:], simple=True)
        if kind in ("var", "scale"):
            return jnp.asarray(leaf * rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
        if kind in ("mean", "bias"):
            return jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(moved, variables), x


def training(model, variables, x):
    """Output, new statistics and gradients of a step."""

    @jax.jit
    def run(variables, x):
        def loss(params):
            given = {**variables, "params": params}
            y, updated = model.apply(given, x, train=True, mutable=["batch_stats"])
            return jnp.sum(y**2), (y, updated["batch_stats"])

        return jax.grad(loss, has_aux=True)(variables["params"])

    return run(variables, x)


def made(model, x, *args, **kwargs):
    variables = model.init(jax.random.key(0), x, *args, **kwargs)
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype),
        variables,
    )


def update(model, variables, *args, **kwargs):
    """The output and the new statistics of a training call."""
    y, updated = model.apply(variables, *args, **kwargs, mutable=["batch_stats"])
    return y, updated["batch_stats"]


class Two(nnx.Module):
    def __init__(self, rngs, kind=nnx.BatchNorm, **options):
        self.bn0 = kind(4, rngs=rngs, **options)
        self.bn1 = kind(4, momentum=0.8, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.bn1(self.bn0(x)))


class LinenTwo(nn.Module):
    kind: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = self.kind(name="bn0")(x, use_running_average=not train)
        norm = self.kind(momentum=0.8, name="bn1")
        return jnp.tanh(norm(x, use_running_average=not train))


def two(api, kind=None):
    """A model of two layers, what it is converted with, and how."""
    x = images((6, 4))
    if api == "nnx":
        model = Two(nnx.Rngs(0), *(() if kind is None else (kind,)))
        return model, functools.partial(convert, model), x, {}
    model = LinenTwo() if kind is None else LinenTwo(kind)
    variables = made(model, x)
    return model, functools.partial(convert, model), x, {"variables": variables}
