import jax
import jax.numpy as jnp
import pytest

from bnjax import models
from tests.models.helpers import shapes_of


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlpp", {}, "'mlpp'.*Did you mean 'mlp'"),
        ("inception", {"widht": 0.5}, "no option 'widht'. Did you mean 'width'"),
        ("resnet56", {"depth": 20}, "no option 'depth'"),
    ],
)
def test_what_it_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **options)


def test_the_depth_is_in_the_name():
    assert models.create("resnet56").depth == 56


SHARED = {"classes", "normalization", "activation", "weight_scale"}
SHARED |= {"dtype", "param_dtype"}
RESNET = SHARED | {"width", "zero_scale", "dropout"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", SHARED - {"weight_scale"} | {"hidden", "weight_std"}),
        ("lenet", SHARED | {"pool"}),
        (
            "inception",
            SHARED
            | {"width", "stem", "separable_conv1", "printed_depths", "dropout"}
            | {"local_response_norm", "per_activation"},
        ),
        *((f"resnet{depth}", RESNET) for depth in (20, 50, 56, 110)),
    ],
)
def test_what_each_can_be_told(name, expected):
    assert set(models.options(name)) == expected


SLOW_INCEPTION = pytest.param("inception", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["mlp", "lenet", SLOW_INCEPTION, "resnet20"])
def test_the_logits_of_half_precision_are_float32(name):
    half = jnp.bfloat16
    model = models.create(name, classes=3, dtype=half, param_dtype=half)
    images = jnp.zeros((2, 32, 32, 3))
    variables = shapes_of(model, images)
    assert variables["params"]["logits"]["kernel"].dtype == half
    logits = jax.eval_shape(lambda v: model.apply(v, images, train=False), variables)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
