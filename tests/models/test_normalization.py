import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax.models import MLP, Normalization
from tests.models import numpy_layers as layers
from tests.models.helpers import as_numpy, jit, random_variables, shapes_of, train

KINDS = {
    "batch": Normalization(),
    "ghost": Normalization(virtual_batch_size=4),
    "flax": Normalization("flax", unbiased=False),
    "none": Normalization("none"),
}


class Layer(nn.Module):
    normalization: Normalization
    options: dict

    @nn.compact
    def __call__(self, x, residual=None, *, train):
        return self.normalization(
            x,
            train=train,
            activation="sigmoid",
            name="bn",
            residual=residual,
            param_dtype=x.dtype,
            **self.options,
        )


def values(shape=(4, 3, 2, 5), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape))


def normalized(variables, x):
    params = as_numpy(variables.get("params", {}))
    return layers.normalize(np.asarray(x), params["bn"]) if params else np.asarray(x)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_is_added_before_the_activation(kind, record, x64):
    normalization = Normalization(**{**vars(KINDS[kind]), "record_inputs": record})
    layer, x, residual = Layer(normalization, {}), values(), values(seed=1)
    variables = random_variables(layer, x, residual)
    expected = layers.sigmoid(normalized(variables, x) + residual)
    y = train(layer, variables, x, residual)
    np.testing.assert_allclose(y, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["batch", "ghost", "flax"])
def test_per_activation_takes_statistics_over_the_batch_alone(kind, x64):
    layer, x = Layer(KINDS[kind], {"per_activation": True}), values()
    variables = random_variables(layer, x)
    assert variables["params"]["bn"]["scale"].shape == (3, 2, 5)
    expected = layers.sigmoid(normalized(variables, x))
    np.testing.assert_allclose(train(layer, variables, x), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["batch", "flax"])
def test_a_zero_scale(kind):
    layer = Layer(KINDS[kind], {"zero_scale": True})
    params = layer.init(jax.random.key(0), values(), train=False)["params"]
    np.testing.assert_array_equal(params["bn"]["scale"], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_recording_is_the_input_of_each_sigmoid_and_changes_nothing_else(kind, x64):
    def network(record):
        normalization = Normalization(**{**vars(KINDS[kind]), "record_inputs": record})
        return MLP((7, 3), 4, normalization=normalization, param_dtype=jnp.float64)

    plain, recording, x = network(False), network(True), values((4, 6))
    variables = random_variables(plain, x)
    assert shapes_of(recording, x) == shapes_of(plain, x)

    def run(model):
        mutable = ["batch_stats", "intermediates"]
        return jit(lambda v: model.apply(v, x, train=True, mutable=mutable))(variables)

    (expected, without), (logits, found) = run(plain), run(recording)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    assert not without.get("intermediates")

    params, z = as_numpy(variables["params"]), np.asarray(x)
    assert set(found["intermediates"]) == {"bn_0_input", "bn_1_input"}
    for i in range(2):
        dense = params[f"dense_{i}"]
        z = z @ dense["kernel"] + dense.get("bias", 0)
        if kind != "none":
            z = layers.normalize(z, params[f"bn_{i}"])
        recorded = found["intermediates"][f"bn_{i}_input"]["value"]
        np.testing.assert_allclose(recorded, z, rtol=1e-9)
        z = layers.sigmoid(z)


def test_an_unknown_activation_without_normalization():
    with pytest.raises(ValueError, match=r"'relo' is unknown. Did you mean 'relu'"):
        KINDS["none"](values(), train=True, activation="relo", name="bn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("layer",), "expected one of batch, flax, none"),
        (("flax",), "pass unbiased=False"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Normalization(*options)
