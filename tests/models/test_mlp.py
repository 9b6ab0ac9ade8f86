import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.models import MLP, Normalization
from tests.training import numpy_network

KINDS = {
    "batch": Normalization(),
    "flax": Normalization("flax", unbiased=False),
    "none": Normalization("none"),
}


def images(shape=(6, 4, 5)):
    return np.random.default_rng(0).normal(1, 2, shape)


def apply(model, variables, train):
    @jax.jit
    def run(variables, x):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])

    return run(variables, jnp.asarray(images()))


def variables_of(model, x, seed=0):
    """Variables whose every leaf is some random value, in float64."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(seed), x, train=False))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 1.2, leaf.shape), float),
        variables,
    )


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("train", [True, False])
def test_it_is_the_papers_network(kind, train, x64):
    model = MLP((7, 3), 4, normalization=KINDS[kind], param_dtype=jnp.float64)
    variables = variables_of(model, images())
    params = jax.tree.map(np.asarray, variables["params"])
    stats = jax.tree.map(np.asarray, variables.get("batch_stats", {}))
    logits, updated = apply(model, variables, train)
    expected, new_stats, _ = numpy_network.forward(params, stats, images(), train=train)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    expected_stats = new_stats if train else stats
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        updated.get("batch_stats", {}),
        expected_stats,
    )


def test_ours_with_flaxs_variance_is_flaxs(x64):
    ours = MLP(normalization=Normalization(unbiased=False), param_dtype=jnp.float64)
    theirs = MLP(normalization=KINDS["flax"], param_dtype=jnp.float64)
    variables = variables_of(ours, images())
    for train in (True, False):
        a, b = (apply(model, variables, train) for model in (ours, theirs))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), a, b)


@pytest.mark.parametrize(
    ("kind", "parameters"), [("batch", 100_010), ("flax", 100_010), ("none", 99_710)]
)
def test_how_many_parameters(kind, parameters):
    model = MLP(normalization=KINDS[kind])
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
    )
    leaves = jax.tree.leaves(shapes["params"])
    assert sum(leaf.size for leaf in leaves) == parameters
    assert ("batch_stats" in shapes) == (kind != "none")
    assert ("bias" in shapes["params"]["dense_0"]) == (kind == "none")


@pytest.mark.parametrize("std", [0.01, 0.3])
def test_weights_are_gaussian_of_the_std_asked_for(std):
    model = MLP((100,), weight_std=std)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 784)), train=False))
    kernel = np.asarray(init(jax.random.key(1))["params"]["dense_0"]["kernel"])
    assert kernel.std() == pytest.approx(std, rel=0.02)
    assert kernel.mean() == pytest.approx(0, abs=0.02 * std)
    within = (np.abs(kernel) < std).mean()
    assert within == pytest.approx(0.6827, abs=0.01)


def test_an_unknown_normalization():
    with pytest.raises(ValueError, match="expected one of batch, flax, none"):
        Normalization("layer")  # pyright: ignore[reportArgumentType]


def test_flax_has_no_unbiased_variance():
    with pytest.raises(ValueError, match="pass unbiased=False"):
        Normalization("flax")
