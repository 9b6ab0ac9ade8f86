import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax.diagnostics import input_percentiles, movement, nonlinearity_inputs
from bnjax.models import MLP, Normalization
from tests.models.helpers import as_numpy, jit, random_variables

KINDS = {
    "batch": Normalization(),
    "flax": Normalization("flax", unbiased=False),
    "none": Normalization("none"),
}


def inputs_by_numpy(variables, z, *, train):
    """What the sigmoids of a network of two hidden layers are given."""
    params, found = as_numpy(variables["params"]), {}
    for i in range(2):
        dense, name = params[f"dense_{i}"], f"bn_{i}"
        u = z @ dense["kernel"] + dense.get("bias", 0.0)
        if name in params:
            stats = {"mean": u.mean(0), "var": u.var(0)}
            if not train:
                stats = as_numpy(variables["batch_stats"][name])
            u = (u - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
            u = u * params[name]["scale"] + params[name]["bias"]
        found[name] = u
        z = 1 / (1 + np.exp(-u))
    return found


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_those_of_the_network(kind, train, x64):
    model = MLP((7, 3), 4, normalization=KINDS[kind], param_dtype=jnp.float64)
    images = np.random.default_rng(0).normal(1, 2, (6, 4, 5))
    variables = random_variables(model, images, dtype=float)
    before = jax.tree.map(np.array, variables)

    found = jit(functools.partial(nonlinearity_inputs, model, train=train))(
        variables, images
    )
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
    variables = random_variables(model, images)
    found = jax.eval_shape(
        lambda v: nonlinearity_inputs(model, v, images, train=train), variables
    )
    shape = (4, 2, 3, 2)
    shapes = {name: u.shape for name, u in found.items()}
    assert shapes == {"branch_0/bn": shape, "branch_1/bn": shape}


class Plain(nn.Module):
    def __call__(self, images, *, train):
        return images


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Plain(), TypeError, "Plain has no field `normalization`"),
        (Tree(layers=0), ValueError, "no layer of Tree goes through"),
    ],
)
def test_a_model_that_records_nothing_is_refused(model, error, message):
    images = jnp.ones((4, 2, 3, 1))
    variables = random_variables(model, images)
    with pytest.raises(error, match=message):
        nonlinearity_inputs(model, variables, images)


def test_percentiles_of_feature_maps_are_over_examples_and_positions():
    # Channel 0 holds 0..11 once each, channel 1 ten times as much.
    values = np.random.default_rng(0).permutation(12).reshape(3, 2, 2)
    u = np.stack([values, 10 * values], axis=-1)
    found = input_percentiles({"bn": jnp.asarray(u, jnp.float32)}, (0, 50, 75, 100))
    expected = np.array([0, 5.5, 8.25, 11])
    np.testing.assert_allclose(found["bn"], np.stack([expected, 10 * expected], 1))


@pytest.mark.parametrize("axis", [0, -1])
def test_movement_of_each_curve(axis):
    curves = np.array([[0.0, 5.0], [3.0, 5.0], [-1.0, 5.5], [0.0, 5.0]])
    path, span = movement(curves if axis == 0 else curves.T, axis=axis)
    np.testing.assert_allclose(path, [3 + 4 + 1, 0 + 0.5 + 0.5])
    np.testing.assert_allclose(span, [4, 0.5])
