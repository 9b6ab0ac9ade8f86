import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from bnjax.models import Normalization
from bnjax.models.layers import (
    ConvNorm,
    classify,
    convolution_init,
    local_response_normalization,
    scaled,
)
from tests.models import numpy_layers as layers
from tests.models.helpers import as_numpy, jit, random_variables, train


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "stride": 2},
        {"kernel": 1},
        {"kernel": 3, "stride": 2, "padding": 1},
        {"kernel": 4, "stride": 2, "depth_multiplier": 2},
    ],
    ids=["3x3/2", "1x1", "3x3/2 padded by 1", "separable 4x4/2"],
)
def test_it_convolves_normalizes_and_activates(options, kind, x64):
    layer = ConvNorm(
        5, normalization=Normalization(kind), param_dtype=jnp.float64, **options
    )
    x = np.random.default_rng(0).normal(1, 2, (3, 6, 5, 2))
    variables = random_variables(layer, x)
    params = variables["params"]
    assert ("bias" in params["conv"]) == (kind == "none")
    assert ("bn" in params) == (kind == "batch")
    assert set(params.get("depthwise", {"kernel"})) == {"kernel"}
    expected = layers.conv_norm(
        x,
        as_numpy(params),
        options.get("stride", 1),
        options.get("padding", "SAME"),
    )
    np.testing.assert_allclose(train(layer, variables, x), expected, rtol=1e-9)


def test_half_precision_stays_half_and_parameters_do_not():
    layer = ConvNorm(5, 3, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 5, 3)), jnp.float32)
    variables = random_variables(layer, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    y = train(layer, variables, x)
    assert y.dtype == jnp.bfloat16
    expected = layers.conv_norm(x, as_numpy(variables["params"]))
    np.testing.assert_allclose(np.asarray(y, float), expected, atol=0.05)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_initial_weights_are_hes_times_the_factor(factor):
    layer = ConvNorm(64, 3, kernel_init=convolution_init(factor))
    x = jnp.zeros((1, 3, 3, 32))
    variables = jit(lambda: layer.init(jax.random.key(0), x, train=False))()
    kernel = np.asarray(variables["params"]["conv"]["kernel"])
    assert kernel.std() == pytest.approx(factor * math.sqrt(2 / (9 * 32)), rel=0.02)


@pytest.mark.parametrize(
    ("features", "width", "expected"),
    [(64, 1.0, 64), (6, 1.0, 6), (96, 0.125, 12), (352, 0.125, 44), (32, 0.1, 4)],
)
def test_widths_are_multiples_of_four(features, width, expected):
    assert scaled(features, width) == expected


def test_features_are_dropped_in_training_alone():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            options = {"kernel_init": nn.initializers.ones, "param_dtype": jnp.float32}
            return classify(x, 1, train=train, dropout=0.4, **options)

    variables = Classifier().init(jax.random.key(0), jnp.ones((1, 1000)), train=False)
    rngs = {"dropout": jax.random.key(1)}
    x = jnp.ones((2, 1000))
    np.testing.assert_allclose(Classifier().apply(variables, x, train=False), 1000)
    dropped = Classifier().apply(variables, x, train=True, rngs=rngs)[:, 0]
    np.testing.assert_allclose(dropped, 1000, rtol=0.1)
    kept = dropped * 0.6
    np.testing.assert_allclose(kept, kept.round(), atol=1e-2)
    assert kept[0] != kept[1]


def responses(x, n=5, alpha=1e-4, beta=0.75, k=1.0):
    y, channels = np.empty_like(x), x.shape[-1]
    for c in range(channels):
        near = x[..., max(0, c - n // 2) : min(channels, c + n // 2 + 1)]
        y[..., c] = x[..., c] / (k + alpha / n * (near**2).sum(-1)) ** beta
    return y


@pytest.mark.parametrize("channels", [3, 8])
def test_it_is_googlenets(channels, x64):
    x = np.random.default_rng(0).normal(0, 100, (2, 3, 3, channels))
    y = local_response_normalization(jnp.asarray(x))
    np.testing.assert_allclose(y, responses(x), rtol=1e-12)
    others = {"alpha": 0.3, "beta": 0.5, "k": 2.0}
    y = local_response_normalization(jnp.asarray(x), size=3, **others)
    np.testing.assert_allclose(y, responses(x, n=3, **others), rtol=1e-12)


def test_half_precision_does_not_overflow():
    y = local_response_normalization(jnp.full((1, 8), 1e4, jnp.float16))
    assert y.dtype == jnp.float16
    expected = responses(np.full((1, 8), 1e4))
    np.testing.assert_allclose(np.asarray(y, float), expected, rtol=1e-3)


def test_an_even_size_is_refused():
    with pytest.raises(ValueError, match="size=4; expected an odd number"):
        local_response_normalization(jnp.ones((1, 8)), size=4)


@pytest.mark.slow
def test_its_derivative(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(0, 10, (2, 7)))
    check_grads(lambda x: local_response_normalization(x, alpha=0.5), (x,), 1)
