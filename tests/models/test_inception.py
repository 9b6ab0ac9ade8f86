import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax.models import Inception, Normalization
from bnjax.models.inception import MODULES, InceptionModule, ModuleSize
from bnjax.models.layers import ConvNorm
from tests.models import numpy_layers as layers
from tests.models.helpers import (
    as_numpy,
    count,
    jit,
    random_variables,
    shapes_of,
    train,
)

IMAGENET = jnp.zeros((1, 224, 224, 3))
NONE = Normalization("none")


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({"normalization": NONE}, 11_275_208), ({"separable_conv1": True}, 11_278_528)],
)
def test_how_many_parameters(options, parameters):
    assert count(Inception(**options), IMAGENET) == parameters


def outputs(model, images):
    """The shape (height, channels) that each layer returns; how many parameters."""
    variables = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), images, train=False, capture_intermediates=True
        )
    )
    shapes = {
        name: (layer["__call__"][0].shape[1], layer["__call__"][0].shape[-1])
        for name, layer in variables["intermediates"].items()
        if name not in ("logits", "__call__", "Dropout_0")
    }
    return shapes, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


STEM = {"conv1": (112, 64), "conv2_reduce": (56, 64), "conv2": (56, 192)}
BY_FILTERS = {
    "3a": (28, 256),
    "3b": (28, 320),
    "3c": (14, 576),
    "4a": (14, 576),
    "4b": (14, 576),
    "4c": (14, 608),
    "4d": (14, 608),
    "4e": (7, 1056),
    "5a": (7, 1024),
    "5b": (7, 1024),
}
PRINTED = BY_FILTERS | {"4c": (14, 576), "4d": (14, 576), "4e": (7, 1024)}


@pytest.mark.parametrize("printed", [False, True])
def test_the_output_of_every_module_is_that_of_figure_5(printed):
    expected = PRINTED if printed else BY_FILTERS
    modules = {f"module_{name}": shape for name, shape in expected.items()}
    found, parameters = outputs(Inception(printed_depths=printed), IMAGENET)
    assert found == STEM | modules
    assert printed or parameters == 11_285_224


def test_the_small_stem_works_at_8_4_and_2_pixels():
    model = Inception(classes=10, width=0.125, stem="small")
    found, _ = outputs(model, jnp.zeros((1, 32, 32, 3)))
    sides = {"3a": 8, "3b": 8, "3c": 4, "4a": 4, "4b": 4, "4c": 4, "4d": 4, "4e": 2}
    sides |= {"5a": 2, "5b": 2}
    stem = {"conv1": (32, 8), "conv2_reduce": (16, 8), "conv2": (16, 24)}
    assert found == stem | {
        f"module_{name}": (side, BY_FILTERS[name][1] // 8)
        for name, side in sides.items()
    }


def numpy_module(x, params, size):
    def conv(x, name, stride=1):
        return layers.conv_norm(x, params[name], stride)

    branches = [conv(x, "conv_1x1")] if size.conv_1x1 else []
    branches.append(conv(conv(x, "reduce_3x3"), "conv_3x3", size.stride))
    y = conv(conv(x, "reduce_double"), "double_3x3_a")
    branches.append(conv(y, "double_3x3_b", size.stride))
    take = np.nanmax if size.pool == "max" else np.nanmean
    y = layers.pool(x, take, 3, size.stride)
    branches.append(conv(y, "projection") if size.projection else y)
    return np.concatenate(branches, axis=-1)


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(
    "size",
    [
        ModuleSize("like 3a", 4, 3, 5, 2, 6, "avg", 7),
        ModuleSize("like 3c", 0, 3, 5, 2, 6, "max", 0, stride=2),
        ModuleSize("like 5b", 4, 3, 5, 2, 6, "max", 7),
    ],
    ids=lambda size: size.name,
)
def test_a_module_is_the_figures(size, kind, x64):
    def conv(features, kernel, stride, name):
        return ConvNorm(
            features,
            kernel,
            stride,
            normalization=Normalization(kind),
            param_dtype=jnp.float64,
            name=name,
        )

    x = np.random.default_rng(0).normal(1, 2, (3, 6, 5, 4))
    module = InceptionModule(size, 1.0, conv)
    variables = random_variables(module, x)
    expected = numpy_module(x, as_numpy(variables["params"]), size)
    np.testing.assert_allclose(train(module, variables, x), expected, rtol=1e-9)


def test_where_the_stride_and_the_maximum_are():
    assert [m.name for m in MODULES if m.stride == 2] == ["3c", "4e"]
    assert [m.name for m in MODULES if m.pool == "max"] == ["3c", "4e", "5b"]
    assert [m.name for m in MODULES if not m.conv_1x1] == ["3c", "4e"]


@pytest.mark.parametrize("train", [False, True])
def test_what_the_parts_are_told(train, monkeypatch):
    """LRN is after pool1 and before pool2; the weight scale is the convolutions'."""
    seen = []

    def spy(name, result):
        def called(*args, **options):
            seen.append((name, options.get("dropout"), options.get("train")))
            return result(*args)

        monkeypatch.setattr(f"bnjax.models.inception.{name}", called)

    def respond(x):
        seen.append(x.shape)
        return x

    def init(scale):
        assert scale == 1.5
        seen.append(scale)
        return nn.initializers.zeros

    spy("classify", lambda features, classes: features[:, :classes])
    spy("local_response_normalization", respond)
    spy("convolution_init", init)
    model = Inception(normalization=NONE, dropout=0.4, weight_scale=1.5)
    model = model.clone(local_response_norm=train)
    jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGENET, train=train))
    response = ("local_response_normalization", None, None)
    responses = [response, (1, 56, 56, 64), response, (1, 56, 56, 192)] * train
    scale = [("convolution_init", None, None), 1.5]
    assert seen == [*scale, *responses, ("classify", 0.4, train)]


def test_per_activation_statistics_are_in_the_last_modules_alone():
    model = Inception(per_activation=True)
    stats = shapes_of(model, IMAGENET)["batch_stats"]
    assert stats["module_5a"]["conv_1x1"]["bn"]["mean"].shape == (7, 7, 352)
    assert stats["module_5b"]["projection"]["bn"]["mean"].shape == (7, 7, 128)
    others = {name: stats[name] for name in stats if not name.startswith("module_5")}
    assert {leaf.ndim for leaf in jax.tree.leaves(others)} == {1}


def gradients(model, images):
    variables = random_variables(model, images)
    kernels = jax.tree.map(
        lambda leaf: leaf / math.sqrt(math.prod(leaf.shape[:-1])), variables["params"]
    )

    @jit
    def run(params, stats):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return jax.nn.log_softmax(logits)[:, 0].sum(), updated

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, updated), found = run(kernels, variables["batch_stats"])
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, updated)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


def images_of(size):
    return jnp.asarray(
        np.random.default_rng(0).normal(size=(2, size, size, 3)), jnp.float32
    )


SMALL = {"classes": 10, "width": 0.125, "stem": "small", "separable_conv1": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "size"), [({}, 224), (SMALL | {"printed_depths": True}, 32)]
)
def test_every_parameter_has_a_gradient(options, size):
    found = gradients(Inception(**options), images_of(size))
    assert not [name for name, size in found.items() if size == 0]


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"stem": "tiny"}, (1, 32, 32, 3), "stem='tiny'; expected one of imagenet, sm"),
        ({"width": 0.0}, (1, 32, 32, 3), "width=0.0; expected a positive number"),
        ({}, (1, 32, 32), r"images of shape \(1, 32, 32\); expected \(batch, height"),
    ],
)
def test_what_it_refuses(options, shape, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(Inception(**options), jnp.zeros(shape))
