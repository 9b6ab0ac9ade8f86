import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.diagnostics import layer_block, layer_input, singular_values
from bnjax.models import MLP, Normalization
from tests.models.helpers import as_numpy, random_variables


def network(kind):
    """A network, its variables of random values, and examples, in float64."""
    normalization = Normalization(kind)
    model = MLP((6, 4, 5), 3, normalization=normalization, param_dtype=jnp.float64)
    images = jnp.asarray(np.random.default_rng(0).normal(1, 2, (3, 2, 3)))
    return model, random_variables(model, images, dtype=float), images


def jacobian_by_hand(variables, z):
    """Of the second hidden layer at one example: diag(g'(u) gamma / sigma) W."""
    params = as_numpy(variables["params"])
    kernel = params["dense_1"]["kernel"].T
    u, slope = kernel @ z + params["dense_1"].get("bias", 0.0), 1.0
    if "bn_1" in params:
        stats, own = as_numpy(variables["batch_stats"]["bn_1"]), params["bn_1"]
        slope = own["scale"] / np.sqrt(stats["var"] + 1e-5)
        u = (u - stats["mean"]) * slope + own["bias"]
    z_after = 1 / (1 + np.exp(-u))
    return (z_after * (1 - z_after) * slope)[:, None] * kernel


@pytest.mark.parametrize(
    "kind", ["none", pytest.param("batch", marks=pytest.mark.slow)]
)
def test_block_of_a_hidden_layer(kind, x64):
    model, variables, images = network(kind)
    z = layer_input(model, variables, images, "dense_1")
    block = layer_block(model, variables, images, "dense_1", "dense_2")
    after = layer_input(model, variables, images, "dense_2")
    np.testing.assert_allclose(jax.vmap(block)(z), after, rtol=1e-12)
    by_hand = [jacobian_by_hand(variables, np.asarray(example)) for example in z]
    np.testing.assert_allclose(jax.vmap(jax.jacrev(block))(z), by_hand, rtol=1e-10)
    np.testing.assert_allclose(
        jax.jit(lambda z: singular_values(block, z))(z),
        np.linalg.svd(by_hand, compute_uv=False),
        rtol=1e-8,
    )


def test_a_block_over_several_layers_is_their_composition(x64):
    model, variables, images = network("batch")
    z = layer_input(model, variables, images, "dense_0")
    whole = layer_block(model, variables, images, "dense_0", "logits")
    parts = [
        layer_block(model, variables, images, f"dense_{i}", end)
        for i, end in enumerate(("dense_1", "dense_2", "logits"))
    ]
    expected = parts[2](parts[1](parts[0](z[2])))
    np.testing.assert_allclose(whole(z[2]), expected, rtol=1e-12)


def test_singular_values_of_arrays_of_several_dimensions():
    matrix = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)

    def function(z):
        return (jnp.asarray(matrix) @ z.reshape(6)).reshape(5, 1)

    found = singular_values(function, jnp.ones((2, 2, 3)))
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(found, np.stack([expected] * 2), rtol=1e-5)


@pytest.mark.parametrize(("start", "end"), [("dens_1", "logits"), ("dense_1", "logit")])
def test_an_unknown_layer_suggests_the_right_one(start, end, x64):
    model, variables, images = network("batch")
    block = layer_block(model, variables, images, start, end)
    with pytest.raises(ValueError, match=r"Did you mean '(dense_1|logits)'"):
        block(jnp.ones(6))
