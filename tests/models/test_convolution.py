import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.models import Normalization
from bnjax.models.layers import ConvNorm, convolution_init, scaled
from tests.models import numpy_layers as layers
from tests.models.helpers import as_numpy, jit, random_variables, shapes_of, train


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
    expected = layers.conv_norm(
        x,
        as_numpy(variables["params"]),
        options.get("stride", 1),
        options.get("padding", "SAME"),
    )
    np.testing.assert_allclose(train(layer, variables, x), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("separable", [False, True])
def test_one_bias_or_one_scale_and_shift(kind, separable):
    layer = ConvNorm(
        5,
        3,
        depth_multiplier=2 if separable else None,
        normalization=Normalization(kind),
    )
    params = shapes_of(layer, jnp.zeros((2, 4, 4, 3)))["params"]
    assert ("bias" in params["conv"]) == (kind == "none")
    assert ("bn" in params) == (kind == "batch")
    if separable:
        assert set(params["depthwise"]) == {"kernel"}


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
