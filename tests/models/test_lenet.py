import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.models import LeNet, Normalization
from tests.models import numpy_layers as layers
from tests.models.helpers import as_numpy, count, random_variables, shapes_of, train

# By hand: 5*5*1*6, 5*5*6*16, 256*120, 120*84, 84*10 + 10; then, of the 226 hidden
# units, scale and shift, or the bias.
WEIGHTS = 150 + 2400 + 30720 + 10080 + 850


@pytest.mark.parametrize(("kind", "each"), [("batch", 2), ("none", 1)])
def test_how_many_parameters(kind, each):
    model = LeNet(normalization=Normalization(kind))
    expected = WEIGHTS + each * (6 + 16 + 120 + 84)
    assert count(model, jnp.zeros((1, 28, 28, 1))) == expected


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_it_is_lenet(pool, kind, x64):
    model = LeNet(pool=pool, normalization=Normalization(kind), param_dtype=jnp.float64)
    images = np.random.default_rng(0).normal(1, 2, (4, 28, 28, 1))
    variables = random_variables(model, images)
    params, x = as_numpy(variables["params"]), images
    take = np.max if pool == "max" else np.mean
    for name in ("conv1", "conv2"):
        x = layers.conv_norm(x, params[name], padding=0, activate=layers.sigmoid)
        x = layers.pool(x, take, 2, 2, padding=0)
    x = x.reshape(4, 256)
    for i in (1, 2):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"].get("bias", 0)
        x = layers.normalize(x, params[f"bn{i}"]) if kind == "batch" else x
        x = layers.sigmoid(x)
    expected = x @ params["logits"]["kernel"] + params["logits"]["bias"]
    np.testing.assert_allclose(train(model, variables, images), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 8, 8, 1), "height and width 16 or more"),
        ({"pool": "min"}, (1, 28, 28, 1), "pool='min'; expected one of avg, max"),
    ],
)
def test_what_it_refuses(options, shape, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(LeNet(**options), jnp.zeros(shape))
