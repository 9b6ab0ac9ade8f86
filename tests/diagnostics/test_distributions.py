import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax.diagnostics import input_percentiles, movement, nonlinearity_inputs
from bnjax.models import MLP, Normalization

KINDS = {
    "batch": Normalization(),
    "flax": Normalization("flax", unbiased=False),
    "none": Normalization("none"),
}


def random_variables(model, x):
    """Variables whose every leaf is some random value, in float64."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 1.2, leaf.shape), float), variables
    )


def inputs_by_numpy(variables, z, *, train):
    """What the sigmoids of a network of two hidden layers are given."""
    params, found = variables["params"], {}
    for i in range(2):
        dense = params[f"dense_{i}"]
        u = z @ np.asarray(dense["kernel"]) + np.asarray(dense.get("bias", 0.0))
        if f"bn_{i}" in params:
            stats, own = variables["batch_stats"][f"bn_{i}"], params[f"bn_{i}"]
            mean, var = np.asarray(stats["mean"]), np.asarray(stats["var"])
            if train:
                mean, var = u.mean(0), u.var(0)
            u = (u - mean) / np.sqrt(var + 1e-5)
            u = u * np.asarray(own["scale"]) + np.asarray(own["bias"])
        found[f"bn_{i}"] = u
        z = 1 / (1 + np.exp(-u))
    return found


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_those_of_the_network(kind, train, x64):
    model = MLP((7, 3), 4, normalization=KINDS[kind], param_dtype=jnp.float64)
    images = np.random.default_rng(0).normal(1, 2, (6, 4, 5))
    variables = random_variables(model, images)
    before = jax.tree.map(np.array, variables)

    @jax.jit
    def inputs(variables, images):
        return nonlinearity_inputs(model, variables, images, train=train)

    found = inputs(variables, images)
    expected = inputs_by_numpy(variables, images.reshape(6, -1), train=train)
    assert set(found) == set(expected)
    for name, u in expected.items():
        np.testing.assert_allclose(found[name], u, rtol=1e-11)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


class Branch(nn.Module):
    normalization: Normalization

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(2, (1, 1), name="conv")(x)
        return self.normalization(x, train=train, activation="relu", name="bn")


class Tree(nn.Module):
    normalization: Normalization = Normalization()
    layers: int = 1

    @nn.compact
    def __call__(self, images, *, train):
        x = images
        for i in range(self.layers):
            x = Branch(self.normalization, name=f"branch_{i}")(x, train)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="logits")(x.mean((1, 2)))


@pytest.mark.parametrize("train", [True, False])
def test_layers_inside_others_have_their_path(train):
    model, images = Tree(layers=2), jnp.ones((4, 2, 3, 1)).at[1].set(2.0)
    variables = model.init(jax.random.key(0), images, train=False)
    found = nonlinearity_inputs(model, variables, images, train=train)
    assert {name: u.shape for name, u in found.items()} == {
        "branch_0/bn": (4, 2, 3, 2),
        "branch_1/bn": (4, 2, 3, 2),
    }


def test_a_model_without_the_field_is_refused():
    class Plain(nn.Module):
        def __call__(self, images, *, train):
            return images

    with pytest.raises(TypeError, match="Plain has no field `normalization`"):
        nonlinearity_inputs(Plain(), {}, jnp.ones((2, 3)))


def test_a_model_that_records_nothing_is_refused():
    model, images = Tree(layers=0), jnp.ones((4, 2, 3, 1))
    variables = model.init(jax.random.key(0), images, train=False)
    with pytest.raises(ValueError, match="no layer of Tree goes through"):
        nonlinearity_inputs(model, variables, images)


def test_percentiles_of_feature_maps_are_over_examples_and_positions():
    # Channel 0 holds 0..11 once each, channel 1 ten times as much.
    values = np.random.default_rng(0).permutation(12).reshape(3, 2, 2)
    u = np.stack([values, 10 * values], axis=-1)
    found = input_percentiles({"bn": jnp.asarray(u, jnp.float32)}, (0, 50, 75, 100))
    expected = np.array([0, 5.5, 8.25, 11])
    np.testing.assert_allclose(found["bn"], np.stack([expected, 10 * expected], 1))


def test_movement_of_each_curve():
    curves = np.array([[0.0, 5.0], [3.0, 5.0], [-1.0, 5.5], [0.0, 5.0]])
    path, span = movement(curves)
    np.testing.assert_allclose(path, [3 + 4 + 1, 0 + 0.5 + 0.5])
    np.testing.assert_allclose(span, [4, 0.5])
    path, span = movement(curves.T, axis=-1)
    np.testing.assert_allclose(path, [8, 1])
    np.testing.assert_allclose(span, [4, 0.5])
